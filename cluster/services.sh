#!/usr/bin/env bash
# MLflow and PostgreSQL for a cluster's head: on loopback alone, so that the head alone reaches them.
#
#   services.sh start FOLDER     starts both; their files and passwords are kept in FOLDER, which
#                                no other machine may use meanwhile
#   services.sh stop FOLDER
#   source FOLDER/environment    tells supsup where they are
set -euo pipefail
umask 077

action=${1:?start or stop}
folder=$(realpath -m "${2:?a folder}")
postgres_port=${POSTGRES_PORT:-5432}
mlflow_port=${MLFLOW_PORT:-5000}
PATH=$PATH:$(printf '%s:' /usr/lib/postgresql/*/bin)

# FOLDER outlives machines, and on the next one any process may have a number that was kept: it is
# ours if its command line has these words.
ours() {
  local number words
  number=$(head -n 1 "$1" 2> /dev/null) &&
    words=$(tr '\0' ' ' 2> /dev/null < "/proc/$number/cmdline") && [[ "$words" == *" $2 "* ]]
}
mlflow_runs() { ours "$folder/mlflow.pid" "--default-artifact-root $folder/artifacts"; }
postgres_runs() { ours "$folder/postgres/postmaster.pid" "-D $folder/postgres"; }

start_postgres() {
  if [ ! -f "$folder/postgres/PG_VERSION" ]; then
    python3 -c 'import secrets; print(secrets.token_hex(24))' > "$folder/password"
    initdb -D "$folder/postgres" -U supsup -E UTF8 --auth=scram-sha-256 \
      --pwfile="$folder/password" > "$folder/initdb.log"
  fi
  if ! postgres_runs; then
    rm -f "$folder/postgres/postmaster.pid"
    pg_ctl start -w -D "$folder/postgres" -l "$folder/postgres.log" \
      -o "-c listen_addresses=127.0.0.1 -c unix_socket_directories= -p $postgres_port" \
      > "$folder/start.log"
  fi
  export PGPASSWORD PGHOST=127.0.0.1 PGPORT=$postgres_port PGUSER=supsup
  PGPASSWORD=$(cat "$folder/password")
  # Each has its own: both keep their schema's version in a table of the same name.
  for database in mlflow studies; do
    psql -qtA -d postgres -c "select 1 from pg_database where datname = '$database'" | grep -q 1 ||
      createdb "$database"
  done
  local server="postgresql://supsup:$PGPASSWORD@127.0.0.1:$postgres_port"
  # In files and environments alone: a command line can be read by every user of the machine.
  printf 'export SUPSUP_STORAGE=%s/studies SUPSUP_TRACKING_URI=http://127.0.0.1:%s\n' \
    "$server" "$mlflow_port" > "$folder/environment"
  export MLFLOW_BACKEND_STORE_URI=$server/mlflow
}

start_mlflow() {
  export MLFLOW_DISABLE_TELEMETRY=true MLFLOW_SERVER_ENABLE_JOB_EXECUTION=false
  local names="localhost,127.0.0.1,localhost:$mlflow_port,127.0.0.1:$mlflow_port"
  setsid nohup mlflow server --host 127.0.0.1 --port "$mlflow_port" --workers 1 \
    --allowed-hosts "$names" --default-artifact-root "$folder/artifacts" \
    > "$folder/mlflow.log" 2>&1 < /dev/null &
  echo $! > "$folder/mlflow.pid"
}

case $action in
  start)
    mkdir -p "$folder"
    start_postgres
    mlflow_runs || start_mlflow
    echo "source $folder/environment"
    ;;
  stop)
    if mlflow_runs; then kill -- "-$(cat "$folder/mlflow.pid")"; fi
    rm -f "$folder/mlflow.pid"
    if postgres_runs; then pg_ctl stop -w -m fast -D "$folder/postgres" > "$folder/stop.log"; fi
    ;;
  *) echo "start or stop, not $action" >&2; exit 2 ;;
esac
