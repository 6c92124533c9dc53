"""What ``supsup doctor`` says of a study's storage."""

from pathlib import Path

import optuna
import sqlalchemy
from alembic.script import ScriptDirectory
from sqlalchemy.engine import make_url

from orchestrator.finding import Finding
from supsup.errors import UserError, one_line
from sweeps.storage import check_storage, public

_SECONDS = 5


def storage(url: str | None) -> list[Finding]:
    """Look whether a study can be kept in a storage. Writes nothing."""
    what = "storage"
    if url is None:
        return [Finding("ok", what, "a journal in each sweep's folder")]
    try:
        check_storage(url)
        shown = public(url)
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and not Path(parsed.database or "").exists():
            return [Finding("ok", what, f"{shown}: none yet, the first sweep makes it")]
        found = _revision(parsed)
    except UserError as error:
        return [Finding("fail", what, str(error))]
    except ImportError as error:
        remedy = "install it beside supsup"
        return [Finding("fail", what, f"{shown} needs the driver {error.name}", remedy)]
    except (sqlalchemy.exc.SQLAlchemyError, OSError, UnicodeError) as error:
        remedy = "start it, or mend --storage"
        return [Finding("fail", what, f"{shown}: {one_line(error)}", remedy)]
    if found is None:
        return [Finding("ok", what, f"{shown}: empty, the first sweep makes its tables")]
    if found != _head():
        # MLflow notes its revision in a table of the same name.
        remedy = "give studies a database of their own, or: optuna storage upgrade --storage URL"
        value = f"{shown}: tables of MLflow or of another Optuna ({found})"
        return [Finding("fail", what, value, remedy)]
    return [Finding("ok", what, f"{shown}, schema of this version")]


def _revision(url: sqlalchemy.URL) -> str | None:
    """Return the revision of a database's tables; None if it has none."""
    is_postgres = url.get_backend_name() == "postgresql"
    arguments = {"connect_timeout": _SECONDS} if is_postgres else {"timeout": _SECONDS}
    engine = sqlalchemy.create_engine(url, connect_args=arguments)
    try:
        with engine.connect() as connection:
            if not sqlalchemy.inspect(connection).has_table("alembic_version"):
                return None
            query = sqlalchemy.text("select version_num from alembic_version")
            return str(connection.execute(query).scalar())
    finally:
        engine.dispose()


def _head() -> str | None:
    folder = Path(optuna.storages.__file__).parent / "_rdb" / "alembic"
    return ScriptDirectory(str(folder)).get_current_head()
