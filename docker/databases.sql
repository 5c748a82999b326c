-- Executed once by PostgreSQL's image, on an empty volume. Each server creates and migrates its own tables.
CREATE DATABASE prefect;
CREATE DATABASE mlflow;
