#!/usr/bin/env bash
# Makes the offline installation kit: every wheel that a hospital or a coordinator needs, install.sh, and the documents.
#
#   deploy/make-kit.sh [PYTHON [FOLDER]]          # `make kit`; by default python3.11 and dist/
#
# The kit is FOLDER/kit, and one file to carry: FOLDER/consilium-VERSION-....tar, whose SHA-256 is printed. It is for the
# version of PYTHON and for this kind of machine. The wheels are those of constraints.txt, from wherever pip is told to take
# them; they are compressed already, so the tar is not. The same wheels and the same sources make the same bytes.
set -euo pipefail
umask 022
export LC_ALL=C PIP_DISABLE_PIP_VERSION_CHECK=1

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=$(command -v "${1:-python3.11}")
python=$(cd "$(dirname "$python")" && pwd)/$(basename "$python")
mkdir -p "${2:-$root/dist}"
out=$(cd "${2:-$root/dist}" && pwd)
extras=embedded,pacs

scratch=$(mktemp -d "$out/.kit-XXXXXX")
trap 'rm -rf "$scratch"' EXIT
kit=$scratch/kit
mkdir -p "$kit/wheels" "$scratch/source"

commit=$(git -C "$root" describe --always --dirty 2>/dev/null || echo unknown)
SOURCE_DATE_EPOCH=${SOURCE_DATE_EPOCH:-$(git -C "$root" log -1 --format=%ct 2>/dev/null || echo 315532800)}
export SOURCE_DATE_EPOCH

# A build in the checkout would pack what an earlier one left in build/.
tar -C "$root" --exclude=__pycache__ -c client common server simulations pyproject.toml README.md LICENSE |
    tar -x -C "$scratch/source"
(cd "$root" && "$python" -m pip wheel --quiet --constraint constraints.txt --wheel-dir "$kit/wheels" \
    "$scratch/source[$extras]")

cd "$kit"
for wheel in wheels/*.whl; do # NAME-VERSION-TAGS.whl, where neither has a hyphen
    IFS=- read -r name version _ <<<"${wheel#wheels/}"
    printf '%s==%s --hash=sha256:%s\n' "$name" "$version" "$(sha256sum "$wheel" | cut -d' ' -f1)"
done >requirements.txt

# The oldest glibc that has all of what some wheel asks for: that of the most demanding one.
glibc=$(for wheel in wheels/*.whl; do
    sed 's/manylinux2014_/manylinux_2_17_/g; s/manylinux2010_/manylinux_2_12_/g; s/manylinux1_/manylinux_2_5_/g' <<<"$wheel" |
        { grep -oE 'manylinux_2_[0-9]+' || true; } | cut -d_ -f3 | sort -n | head -n 1
done | sort -n | tail -n 1)
kib=$(for wheel in wheels/*.whl; do "$python" -m zipfile --list "$wheel" || exit 1; done |
    awk '{ sum += $NF } END { printf "%d", sum / 1024 }')
series=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
version=$(sed -n 's/^consilium==\([^ ]*\) .*/\1/p' requirements.txt)

cp -R "$root/deploy" "$root/docs" "$root/LICENSE" "$root/CHANGELOG.md" .
mv deploy/install.sh .
rm deploy/make-kit.sh
{
    printf 'version %s\ncommit %s\npython %s\n' "$version" "$commit" "$series"
    printf 'system %s\nglibc 2.%s\ninstalled_kib %s\n' "$(uname -sm)" "${glibc:-0}" "$kib"
    (cd wheels && stat --format='wheel %n %s' -- *.whl)
} >MANIFEST
find . -type f -printf '%P\0' | sort -z | xargs -0 sha256sum >"$scratch/SHA256SUMS"
mv "$scratch/SHA256SUMS" .
chmod -R u=rwX,go=rX .

name=consilium-$version-py$series-$(uname -s | tr '[:upper:]' '[:lower:]')-$(uname -m)
tar -C "$scratch" --sort=name --mtime="@$SOURCE_DATE_EPOCH" --owner=0 --group=0 --numeric-owner \
    --transform="s,^kit,$name," -cf "$scratch/$name.tar" kit
rm -rf "$out/kit"
mv "$kit" "$out/kit"
mv "$scratch/$name.tar" "$out/$name.tar"

printf '%s: %s wheels, %s; %s once installed\n' "$out/kit" "$(wc -l <"$out/kit/requirements.txt")" \
    "$(du -sh --apparent-size "$out/kit" | cut -f1)" "$(numfmt --to=iec --from-unit=1024 "$kib")"
cd "$out"
sha256sum "$name.tar" | tee "$name.tar.sha256"
