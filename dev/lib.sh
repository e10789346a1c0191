# lib.sh -- what the scripts of this folder share.  Sourced, with set -euo pipefail, from the checkout's root.
#
# A PostgreSQL server refuses to run as root, and an ordinary user may not write into the system's PostgreSQL.
# Both are met by a private copy of its installation (private-pg) and, for root, by running the server and all
# that belongs to it as $RUN_USER in $RUN_ROOT, a directory that this user can reach.

cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
export LC_ALL=C.UTF-8

say()  { printf '\n==> %s\n' "$*"; }
fail() { printf '\nmillm: %s\n' "$1" >&2; [ $# -lt 2 ] || printf '       %s\n' "$2" >&2; exit 1; }

# The user that runs servers, and where its files are: the checkout itself unless we are root and that user cannot enter it.
if [ "$(id -u)" = 0 ]; then
	RUN_USER=${MILLM_RUN_USER:-postgres}
else
	RUN_USER=$(id -un)
fi

# That user may not be able to enter the checkout: its commands run in $RUN_ROOT.
as_run_user() {
	if [ "$(id -un)" = "$RUN_USER" ]; then "$@"; else (cd "${RUN_ROOT:-/}" && runuser -u "$RUN_USER" -- "$@"); fi
}

# Called once the packages are there (the user comes with PostgreSQL's).
find_run_root() {
	id "$RUN_USER" >/dev/null 2>&1 || fail "there is no user \"$RUN_USER\" to run the server as" "Set MILLM_RUN_USER to an ordinary user."
	if as_run_user test -x "$ROOT/dev"; then
		RUN_ROOT=$ROOT
	else
		RUN_ROOT=/var/tmp/millm-$(printf %s "$ROOT" | sha256sum | cut -c1-12)
		mkdir -p "$RUN_ROOT"
		chmod 755 "$RUN_ROOT"
		# What the server and its tests read lives there; the checkout sees it through links.
		for d in .fixtures .playground build/pg; do
			mkdir -p "$RUN_ROOT/$d" "$(dirname "$d")"
			[ -L "$d" ] || { rm -rf "$d"; ln -s "$RUN_ROOT/$d" "$d"; }
		done
	fi
	# A directory that the server's user owns
	mkdir -p "$RUN_ROOT/.playground" "$RUN_ROOT/.fixtures" "$RUN_ROOT/build/pg"
	[ "$(id -u)" != 0 ] || chown "$RUN_USER" "$RUN_ROOT/.playground"
	PG_PREFIX=$RUN_ROOT/build/pg
}

# PostgreSQL's own programs, of the newest major version that has its server headers too.
system_pg_config() {
	if [ -n "${PG_CONFIG:-}" ]; then echo "$PG_CONFIG"; return; fi
	local v
	for v in 18 17 16 15 14; do
		if [ -x "/usr/lib/postgresql/$v/bin/pg_config" ] && [ -f "/usr/lib/postgresql/$v/lib/pgxs/src/makefiles/pgxs.mk" ] &&
			[ -x "/usr/lib/postgresql/$v/bin/postgres" ]; then
			echo "/usr/lib/postgresql/$v/bin/pg_config"
			return
		fi
	done
	command -v pg_config || true
}

# A copy of the PostgreSQL installation in which we may install: programs copied (they find everything else
# relative to themselves), libraries and data linked.  Sets PG_BIN and PG_CONFIG to the copy's.
private_pg() {
	local sys bin share pkglib include
	sys=$(system_pg_config)
	[ -n "$sys" ] || fail "PostgreSQL's server packages are missing" "Run \"make setup\"."
	bin=$("$sys" --bindir) share=$("$sys" --sharedir) pkglib=$("$sys" --pkglibdir) include=$("$sys" --includedir)
	PG_BIN=$PG_PREFIX$bin
	if [ ! -x "$PG_BIN/postgres" ] || [ "$bin/postgres" -nt "$PG_BIN/postgres" ]; then
		rm -rf "${PG_PREFIX:?}"/usr "${PG_PREFIX:?}"/opt
		mkdir -p "$PG_BIN" "$PG_PREFIX$share" "$PG_PREFIX$pkglib"
		cp -L "$bin"/* "$PG_BIN/"
		cp -rs "$share/." "$PG_PREFIX$share/"
		cp -rs "$pkglib/." "$PG_PREFIX$pkglib/"
		touch "$PG_BIN/postgres"
	fi
	# libpq's headers, where the copy's pg_config says that they are
	if [ ! -e "$PG_PREFIX$include" ]; then
		mkdir -p "$(dirname "$PG_PREFIX$include")"
		ln -s "$include" "$PG_PREFIX$include"
	fi
	SYSTEM_PG_CONFIG=$sys
	PG_CONFIG=$PG_BIN/pg_config
	export PATH=$PG_BIN:$PATH
}

# Build everything and install it into the private copy.
build_and_install() {
	make --no-print-directory -s -j"$(nproc)" PG_CONFIG="$SYSTEM_PG_CONFIG" all
	# Files of an earlier install may be links into the system's PostgreSQL: never write through them.
	find "$PG_PREFIX" -name 'millm*' -type l -delete
	make --no-print-directory -s PG_CONFIG="$PG_CONFIG" install
	chmod -R a+rX "$PG_PREFIX"
}

# The playground's bridge, if one runs: it lets running requests end.
stop_bridge() {
	local pid
	[ -f "$PLAY/bridge.pid" ] || return 0
	pid=$(cat "$PLAY/bridge.pid")
	rm -f "$PLAY/bridge.pid"
	grep -qa millm-bridge "/proc/$pid/cmdline" 2>/dev/null || return 0
	kill "$pid"
	for _ in $(seq 350); do
		grep -qa millm-bridge "/proc/$pid/cmdline" 2>/dev/null || return 0
		sleep 0.1
	done
	kill -9 "$pid" 2>/dev/null || true
}
