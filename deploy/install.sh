#!/bin/sh
# Installs consilium from the kit that this file is in. Nothing is fetched from any network.
#
#   ./install.sh [--python PYTHON] [FOLDER]       # by default python3.11 and /opt/consilium
#
# Every kit has a folder of its own, FOLDER-VERSION-ID; FOLDER is a link to the one in use, turned in one step once the
# new one is whole. What is running goes on with the version that it was started with until it is started again. An upgrade
# is this command in the next kit, going back is this command in the earlier one; run again, it changes nothing.
# Exit code: 0 done, 1 failed and nothing changed, 2 wrong use.
set -eu
umask 022
unset PYTHONPATH PYTHONHOME

say() { printf '%s\n' "$*"; }
fail() {
    printf 'install.sh: %s\n' "$*" >&2
    exit 1
}
usage() {
    sed -n '4s/^#  *//p' "$0" >&2
    exit 2
}

kit=$(cd "$(dirname "$0")" && pwd -P)
[ -r "$kit/MANIFEST" ] || fail "$kit: no MANIFEST here; this file belongs into a kit, which \`make kit\` makes"
told() { sed -n "s/^$1 //p" "$kit/MANIFEST"; }

series=$(told python)
python=python$series
folder=/opt/consilium
while [ $# -gt 0 ]; do
    case $1 in
    --python) [ $# -ge 2 ] || usage && python=$2 && shift ;;
    --python=*) python=${1#--python=} ;;
    -*) usage ;;
    *) folder=$1 && [ $# -eq 1 ] || usage ;;
    esac
    shift
done
case $folder in
/*) ;;
*) folder=$PWD/$folder ;;
esac
folder=${folder%/}
parent=$(dirname "$folder")
id=$(sha256sum "$kit/SHA256SUMS" | cut -c1-8)
place=$folder-$(told version)-$id

check_machine() {
    [ "$(uname -sm)" = "$(told system)" ] || fail "this kit is for $(told system), this machine is $(uname -sm)"
    glibc=$(getconf GNU_LIBC_VERSION 2>/dev/null | cut -d' ' -f2)
    [ -n "$glibc" ] || fail "this kit needs glibc $(told glibc) or newer; this machine has another C library"
    printf '%s\n' "$(told glibc)" "$glibc" | sort -CV || fail "this kit needs glibc $(told glibc) or newer, found $glibc"
}

check_python() {
    command -v "$python" >/dev/null || fail "$python: not found; install Python $series, or name it with --python"
    found=$("$python" -I -c 'import sys; print("%d.%d" % sys.version_info[:2])') || fail "$python: does not run"
    [ "$found" = "$series" ] || fail "$python: is Python $found, this kit is for $series; name another with --python"
    "$python" -I -c 'import venv, ensurepip' 2>/dev/null ||
        fail "$python: has no venv; install it first (Debian, Ubuntu: python$series-venv)"
}

check_place() {
    [ -d "$parent" ] || fail "$parent: no such folder; make it first"
    [ -w "$parent" ] || fail "$parent: cannot be written by this user; run as root, or name another folder"
    [ -L "$folder" ] || [ ! -e "$folder" ] ||
        fail "$folder: is there and no link of this script's; move it away first: mv $folder $folder-before"
}

check_space() {
    free=$(df -Pk "$parent" | awk 'NR == 2 { print $4 }')
    need=$(($(told installed_kib) * 5 / 4 + 65536)) # compiled modules and the environment itself come on top
    [ "$free" -ge "$need" ] || fail "$parent: $((free / 1024)) MiB free, expected $((need / 1024)); make room first"
}

check_kit() {
    (cd "$kit" && sha256sum --check --strict --quiet SHA256SUMS) ||
        fail "$kit: the files named above are not what they were; unpack the kit again, or fetch it again"
}

build() {
    rm -rf "$place" # of an installation that was cut short
    trap 'rm -rf "$place"' EXIT
    trap 'exit 1' HUP INT TERM
    "$python" -I -m venv "$place/venv" || fail "$place: no environment can be made there"
    "$place/venv/bin/python" -I -m pip --isolated --disable-pip-version-check install --quiet --no-cache-dir \
        --no-index --find-links "$kit/wheels" --require-hashes --requirement "$kit/requirements.txt" ||
        fail "the wheels could not be installed; the lines above say why"
    "$place/venv/bin/python" -I -m pip --isolated check || fail "the installed packages do not fit together"
    mkdir "$place/bin"
    ln -s ../venv/bin/consilium "$place/bin/consilium"
    # Not a link: what is started through FOLDER has to keep its own version when FOLDER is turned to the next.
    printf '#!/bin/sh\nexec "%s" "$@"\n' "$place/venv/bin/python" >"$place/bin/python"
    chmod 755 "$place/bin/python"
    cp -R "$kit/deploy" "$kit/docs" "$kit/LICENSE" "$kit/CHANGELOG.md" "$kit/MANIFEST" "$place"
    "$place/bin/consilium" --version || fail "$place/bin/consilium does not run"
    : >"$place/whole"
    trap - EXIT
}

turn() {
    rm -f "$folder.next"
    ln -s "$(basename "$place")" "$folder.next"
    mv -T "$folder.next" "$folder"
}

check_machine
check_python
check_place
check_kit
before=$(readlink "$folder" || true)
if [ -e "$place/whole" ]; then
    say "$place: installed already"
else
    check_space
    say "$place: installing $(wc -l <"$kit/requirements.txt") packages, which takes some minutes"
    build
fi
if [ "$before" = "$(basename "$place")" ]; then
    say "$folder: uses it already; nothing to do"
    exit 0
fi
turn
say "$folder: now $(basename "$place")"
if [ -n "$before" ]; then
    say "Next: start anew what runs, as $folder/deploy/RUNBOOK.md says: systemctl restart 'consilium-*'"
    say "Back: ln -s $before $folder.next && mv -T $folder.next $folder, and start anew"
else
    say "Next: $folder/deploy/RUNBOOK.md"
fi
