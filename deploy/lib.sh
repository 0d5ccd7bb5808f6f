# shellcheck shell=bash
# What the scripts of this folder share: messages, packages, locks, ports, certificates.
# Sourced after `set -euo pipefail`.

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

# Ctrl-C ends a script in silence: what its child says about it helps nobody.
trap 'exit 130' INT

# --- Messages -----------------------------------------------------------------------------------
# All on stderr: stdout is for results that another program reads.

say() { printf '[%3ds] %s\n' "$SECONDS" "$*" >&2; }
die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 1
}
have() { command -v "$1" >/dev/null 2>&1; }
is_root() { [ "$(id -u)" = 0 ]; }

# quietly LOG MESSAGE COMMAND…: runs a long command, its output in LOG, with a sign of life every
# ten seconds; shows the end of the log when it fails, unless may_fail is set.
quietly() {
  local log=$1 message=$2 status=0 ticker
  shift 2
  say "$message"
  mkdir -p "$(dirname "$log")"
  : >"$log"
  tick "$$" "$log" "$message" 6>&- 7>&- 8>&- 9>&- &
  ticker=$!
  disown
  "$@" >"$log" 2>&1 </dev/null || status=$?
  # Not to be refused: a script that is about to end ignores the other signals, and so do its children.
  kill -KILL "$ticker" 2>/dev/null || true
  [ "$status" = 0 ] || [ -n "${may_fail-}" ] || {
    tail -n 30 "$log" >&2
    say "failed: $message (all of it: $log)"
  }
  return "$status"
}

# Ends with the script that started it, however that ends.
tick() {
  local parent=$1 log=$2 message=$3 seconds=0 line
  while kill -0 "$parent" 2>/dev/null; do
    # Its own output elsewhere: a caller that reads ours to the end must not wait for a sleep.
    sleep 1 >/dev/null 2>&1
    seconds=$((seconds + 1))
    [ $((seconds % 10)) = 0 ] || continue
    line=$(tail -n 1 "$log" 2>/dev/null | tr -d '\r' | cut -c 1-100) || line=
    say "… $message: ${seconds} s${line:+ ($line)}"
  done
}

# --- Packages -----------------------------------------------------------------------------------

can_install() { is_root && have apt-get; }

# install_packages PURPOSE PACKAGE…: Debian packages, when we are root and apt is there. Otherwise
# says what is missing and ends.
install_packages() {
  local purpose=$1 attempt
  shift
  have apt-get || die "missing for $purpose: $* (names of Debian's packages). Install them, then try again."
  is_root || die "missing for $purpose: $*. Install with: sudo apt-get install $*"
  # Two scripts of this checkout may need packages at once; apt only waits for part of its locks.
  mkdir -p "$root/.dev"
  exec 6>>"$root/.dev/apt.lock"
  flock 6
  local may_fail=1
  for attempt in 1 2 3; do
    # The lists may be absent (a slim image) or so old that their files are gone, or another
    # apt may hold the lock on them.
    if [ "$attempt" != 1 ]; then
      quietly "$root/.dev/log/apt.log" "fetching Debian's package lists" apt-get update || sleep 5
    fi
    DEBIAN_FRONTEND=noninteractive quietly "$root/.dev/log/apt.log" "installing $*, for $purpose" \
      apt-get -o DPkg::Lock::Timeout=300 install -y --no-install-recommends "$@" && {
      hash -r
      exec 6>&-
      return
    }
  done
  tail -n 30 "$root/.dev/log/apt.log" >&2
  die "could not install $* for $purpose"
}

# --- Locks --------------------------------------------------------------------------------------

# one_at_a_time FILE WHAT: holds FILE locked (as descriptor 9) until this script ends. Servers that
# outlive the script are started with 9>&-, or they would hold it for ever.
one_at_a_time() {
  have flock || die "flock is missing (Debian: util-linux)"
  if ! { : >>"$1"; } 2>/dev/null; then die "cannot write $1: does it belong to another user?"; fi
  exec 9>>"$1"
  flock -n 9 && return
  say "waiting for another ${0##*/} on $2 to finish"
  flock -w 600 9 || die "another ${0##*/} has been busy on $2 for ten minutes"
}

# --- Ports --------------------------------------------------------------------------------------

# Reads the kernel's table instead of connecting: a connection from the ephemeral range to a free
# port of the same range can meet itself and take the port.
is_port_taken() {
  local hex tables=() table
  hex=$(printf '%04X' "$1")
  for table in /proc/net/tcp /proc/net/tcp6; do [ -r "$table" ] && tables+=("$table"); done
  if [ ${#tables[@]} -gt 0 ]; then
    awk -v port=":$hex" '$4 == "0A" && substr($2, length($2) - 4) == port { found = 1 } END { exit !found }' "${tables[@]}"
  else
    (exec 3<>"/dev/tcp/127.0.0.1/$1") 2>/dev/null
  fi
}

# free_port TAKEN…: not one of those; below the ephemeral range, where outgoing connections come and go.
free_port() {
  local port taken _
  for _ in {1..200}; do
    port=$((15000 + (RANDOM * 32768 + RANDOM) % 17000))
    for taken in "$@"; do [ "$port" != "$taken" ] || continue 2; done
    is_port_taken "$port" && continue
    echo "$port"
    return
  done
  die "found no free port"
}

is_port_number() { [[ $1 =~ ^[0-9]{1,5}$ ]] && [ "$1" -ge 1 ] && [ "$1" -le 65535 ]; }

# --- Processes ----------------------------------------------------------------------------------

# processes_of NAME FOLDER: ids of the processes of that name whose working directory is FOLDER.
# This is how an instance finds its own server: unlike a file with an id in it, it cannot be stale
# and cannot name a stranger.
processes_of() {
  local name=$1 folder=$2 process comm
  [ -d "$folder" ] || return 0
  for process in /proc/[0-9]*; do
    [ "$process/cwd" -ef "$folder" ] || continue
    { read -r comm <"$process/comm"; } 2>/dev/null || continue
    [ "$comm" != "$name" ] || echo "${process#/proc/}"
  done
}

# kill_all LISTING: SIGKILL to all ids that the command LISTING prints, until it prints none.
kill_all() {
  local ids _
  for _ in {1..300}; do
    mapfile -t ids < <("$1")
    [ ${#ids[@]} -gt 0 ] || return 0
    kill -KILL "${ids[@]}" 2>/dev/null || true
    sleep 0.05
  done
  die "processes ${ids[*]} do not end"
}

# bounded COMMAND…: ends it, with all that it started, when this script has taken $limit minutes (if set), or
# when it ends, however it ends: at its end, end_running.
running=
bounded() {
  local left=0 with_parent=() code=0 # 0: as long as it takes
  if [ -n "${limit-}" ]; then
    left=$((limit * 60 - SECONDS))
    [ "$left" -gt 0 ] || return 124
  fi
  if setpriv --pdeathsig TERM true 2>/dev/null; then with_parent=(setpriv --pdeathsig TERM --); fi
  # In the background, so that a signal to this script is heard at once. timeout has a process group of its
  # own, with all that it starts.
  "${with_parent[@]}" timeout --kill-after=10 "$left" "$@" 9>&- &
  running=$!
  wait "$running" || code=$?
  running=
  return "$code"
}

end_running() {
  [ -n "$running" ] || return 0
  # timeout is the leader of its group, but in its first moment.
  kill -KILL -- "-$running" 2>/dev/null || kill -KILL "$running" 2>/dev/null
  wait "$running"
}

# remove_instances FOLDER: servers that tests and the like have started in it, and that were killed before
# they could end them. Then the folder.
remove_instances() {
  local mark folder
  for mark in "$1"/*/lock "$1"/*/*/lock; do
    [ -e "$mark" ] || continue
    folder=${mark%/lock}
    if [ -e "$folder/server.properties" ]; then "$root/deploy/local/kafka" remove "$folder" 9>&-; fi
    if [ -e "$folder/instance" ] || [ -e "$folder/location" ]; then "$root/deploy/local/postgres" remove "$folder" 9>&-; fi
  done
  rm -rf "$1"
}

# --- Certificates -------------------------------------------------------------------------------

# make_certificates FOLDER: ca.crt, and server.crt with server.key for this machine's loopback.
# The CA's key is not kept: nothing else is to be signed by it.
make_certificates() {
  local folder=$1
  need_openssl
  mkdir -p "$folder"
  (
    cd "$folder"
    exec 2>openssl.log
    openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 3650 \
      -keyout ca.key -out ca.crt -subj "/CN=OrderStream local CA" -addext keyUsage=critical,keyCertSign,cRLSign
    openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes \
      -keyout server.key -out server.csr -subj /CN=localhost
    openssl x509 -req -in server.csr -CA ca.crt -CAkey ca.key -CAcreateserial -days 3650 -out server.crt \
      -extfile <(printf '%s\n' subjectAltName=DNS:localhost,IP:127.0.0.1 basicConstraints=CA:FALSE extendedKeyUsage=serverAuth)
    rm -f ca.key ca.srl server.csr
  ) || {
    tail -n 5 "$folder/openssl.log" >&2
    die "openssl could not make certificates in $folder"
  }
}

# --- Settings -----------------------------------------------------------------------------------

# setting NAME ALIAS…: the first that the environment has, else the first that .env has; each may be the
# content of the file that NAME_FILE names. Without blanks at its ends; empty counts as absent. What the
# programs would refuse is refused here: else they would be given another server than was meant.
setting() {
  local place name value file
  for place in of_environment of_dotenv; do
    for name in "$@"; do
      value=$(trimmed "$("$place" "$name")")
      file=$(trimmed "$("$place" "${name}_FILE")")
      if [ -n "$file" ]; then
        [ -z "$value" ] || die "$name and ${name}_FILE are both given; leave one out"
        value=$(cd "$root" && trimmed "$(cat "$file" 2>/dev/null)")
        [ -n "$value" ] || die "${name}_FILE: the file that it names cannot be read, or is empty"
      fi
      [ -z "$value" ] || { echo "$value"; return; }
    done
  done
}

of_environment() { printf '%s' "${!1-}"; }

of_dotenv() {
  local value
  [ -f "$root/.env" ] || return 0
  value=$(sed -nE "1s/^\xef\xbb\xbf//; s/^[[:space:]]*(export[[:space:]]+)?${1}[[:space:]]*=[[:space:]]*//p" "$root/.env" | head -n 1)
  case $value in
  \"*) value=${value#\"} value=${value%%\"*} ;;
  \'*) value=${value#\'} value=${value%%\'*} ;;
  *) value=$(sed -E 's/[[:space:]]+#.*$//' <<<"$value") ;;
  esac
  printf '%s' "$value"
}

trimmed() {
  local value=${1#$'\xef\xbb\xbf'}
  value=${value#"${value%%[![:space:]]*}"}
  printf '%s' "${value%"${value##*[![:space:]]}"}"
}

# shown_dsn DSN: without what may be secret in it.
shown_dsn() {
  case $1 in
  *://*) sed -E 's#//.*@#//…@#; s/\?.*//' <<<"$1" ;;
  *) echo 'the server of your settings' ;;
  esac
}

# Exports the KEY=value lines of a file. Not `source`: values are not quoted for a shell.
load_env() {
  local line
  while IFS= read -r line; do
    [[ $line =~ ^[A-Z_][A-Z0-9_]*= ]] && export "${line?}"
  done <"$1"
}

# --- Use of the infrastructure ------------------------------------------------------------------
# Several scripts of a checkout may use the same database and broker; each holds a shared lock
# (descriptor 8; what outlives it is started with 8>&-), and the last one stops them, unless they
# were started on their own by `deploy/infra up`.

# Starts them and exports where they are.
use_infra() {
  mkdir -p "$root/.dev"
  exec 8>>"$root/.dev/infra.users"
  flock -s 8
  infra_used=1
  "$root/deploy/infra" up --while-used 7>&- 8>&-
  load_env "$root/.dev/env"
}

release_infra() {
  [ -n "${infra_used-}" ] && [ ! -e "$root/.dev/infra.keep" ] && flock -n -x 8 || return 0
  [ "${INFRA_POSTGRES-}${INFRA_KAFKA-}" != givengiven ] || return 0
  say "stopping PostgreSQL and Kafka, as far as they were started here (the data stay)"
  "$root/deploy/infra" down 7>&- 8>&- || true
}

# --- Building -----------------------------------------------------------------------------------

need_redis() { have redis-server || install_packages "the tests of the cache" redis-server; }

need_pgbouncer() { have pgbouncer || install_packages "the tests behind a pooler" pgbouncer; }

# Keys and certificates are made with it.
need_openssl() { have openssl || install_packages "keys and certificates" openssl; }

# What Kafka's client library (C) and its TLS need beside Rust.
need_build_tools() {
  local missing=()
  have cargo || die "Rust is missing: see https://rustup.rs"
  have cc && have c++ || missing+=(g++)
  have make || missing+=(make)
  have pkg-config || missing+=(pkg-config)
  if [ -z "${OPENSSL_DIR-}${OPENSSL_LIB_DIR-}" ]; then
    have pkg-config && pkg-config --exists openssl || missing+=(libssl-dev)
  fi
  [ ${#missing[@]} = 0 ] || install_packages "building" "${missing[@]}"
}

# All that is released, always together: another selection may ask for other features of what they
# share, which would be built anew.
build_release() { (cd "$root" && cargo build --release --locked); }

# Dies where the tests or the benchmark ask for other features of a dependency than the released
# binaries do: it would be compiled twice.
one_set_of_features() {
  local binaries all differing
  packages() {
    cargo tree --locked --prefix none --format '{p} [{f}]' "$@" | sed 's/ (\*)$//; s/ (proc-macro)//' | grep -v ' (/' | sort -u
  }
  cd "$root" || return
  binaries=$(packages -e normal,build) || die "cargo tree failed"
  all=$(packages -e normal,build,dev --workspace) || die "cargo tree failed"
  differing=$(awk 'NR == FNR { known[$0]; package[$1 $2]; next } $1 $2 in package && !($0 in known)' <(echo "$binaries") <(echo "$all"))
  [ -z "$differing" ] || die "the tests ask for other features of these than the binaries do, so they would be compiled twice:
$differing
Name the features in Cargo.toml; in shared/Cargo.toml where we do not use the dependency ourselves."
}

target_folder() {
  local folder=${CARGO_TARGET_DIR:-$root/target}
  [[ $folder = /* ]] || folder=$PWD/$folder
  echo "$folder"
}

# --- HTTP ---------------------------------------------------------------------------------------

# http_status HOST:PORT PATH: prints the status code, or 000 where nobody answers. Without curl,
# which a bare machine lacks.
http_status() {
  local host=${1%:*} port=${1##*:} code _
  host=${host#[} host=${host%]}
  code=$(
    exec 2>/dev/null
    exec 5<>"/dev/tcp/$host/$port" || exit 0
    printf 'GET %s HTTP/1.1\r\nHost: %s\r\nConnection: close\r\n\r\n' "$2" "$1" >&5
    read -rt 5 _ code _ <&5 && echo "$code"
    # To the end, or the service would log a connection that was reset.
    timeout 5 cat <&5 >/dev/null
  ) || true
  echo "${code:-000}"
}
