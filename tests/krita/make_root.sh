#!/bin/bash
# make_root.sh 5.2|5.3|6.0 DIR: a Debian root with that Krita in DIR, beside the machine's own. Needs a Debian or Ubuntu,
# root, debootstrap, about 1.5 GB and 3 minutes. DEBIAN_MIRROR names another mirror than apt's own.
set -euo pipefail
version=$1 root=$2
case $version in
  5.2) suite=trixie packages="krita python3-pyqt5" ;;
  5.3) suite=sid packages="krita python3-pyqt5" ;;
  6.0) suite=sid packages="krita/experimental krita-data/experimental python3-pyqt6 libegl1 qt6-svg-plugins qt6-image-formats-plugins" ;;
  *) echo "unknown version $version: 5.2, 5.3 or 6.0" >&2; exit 2 ;;
esac
mirror=${DEBIAN_MIRROR:-$(apt-get indextargets --format '$(ORIGIN) $(REPO_URI)' 'Created-By: Packages' |
  sed -n 's/^Debian //p' | grep -v security | sort -u | head -n 1)}
mirror=${mirror:-http://deb.debian.org/debian}
[[ -d $root/usr ]] || debootstrap --variant=minbase --include=ca-certificates "$suite" "$root" "$mirror"
cp /etc/resolv.conf "$root/etc/"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod +x "$root/usr/sbin/policy-rc.d"
echo 'Acquire::Check-Valid-Until "false";' >"$root/etc/apt/apt.conf.d/99valid-until"
printf 'path-exclude=/usr/share/%s/*\n' doc man locale >"$root/etc/dpkg/dpkg.cfg.d/small"
[[ $version != 6.0 ]] || echo "deb $mirror experimental main" >"$root/etc/apt/sources.list.d/experimental.list"
empty=$(mktemp -d)
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
"$(dirname "$0")/inroot.sh" "$root" "$empty" "$empty" sh -c "apt-get -q update && apt-get install -qy \
  --no-install-recommends $packages python3 fonts-dejavu-core libgl1-mesa-dri xdotool && apt-get clean"
"$(dirname "$0")/inroot.sh" "$root" "$empty" "$empty" dpkg-query --show krita
