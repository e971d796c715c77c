#!/bin/bash
# As the entry point of the upstream image: as root it gives the data directory to the user postgres and drops its
# privileges; as postgres it makes a database if there is none.
set -e
PATH=$PATH:$(echo /usr/lib/postgresql/*/bin)
export PATH PGDATA=/var/lib/postgresql/data
if [ "$(id -u)" = 0 ]; then
  mkdir -p "$PGDATA" /var/run/postgresql
  chmod 700 "$PGDATA"
  find "$PGDATA" /var/run/postgresql \! -user postgres -exec chown postgres '{}' +
  exec setpriv --reuid=postgres --regid=postgres --init-groups "$0" "$@"
fi
if [ ! -s "$PGDATA/PG_VERSION" ]; then
  initdb --username=postgres --pwfile=<(printf 'secret\n') --auth-local=trust --auth-host=scram-sha-256
  pg_ctl -D "$PGDATA" -o "-c listen_addresses=''" -w start
  psql --username=postgres --no-psqlrc -c 'create database app'
  pg_ctl -D "$PGDATA" -m fast -w stop
fi
exec "$@"
