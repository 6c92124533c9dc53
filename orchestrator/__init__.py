"""SupSup on Ray: workers, the coordinator, the run folder, MLflow tracking, the command line."""
