#!/bin/bash
# inroot.sh ROOT HOME SCENARIOS COMMAND...: runs COMMAND in the Debian root ROOT (make_root.sh), with /dev, /proc, X11's
# sockets, the folders HOME and SCENARIOS under their own names, and all of this machine under /host. The mounts live in
# a namespace of the command's own and end with it. Every exec keeps the process, so signals and its end are the command's.
set -euo pipefail
exec unshare -m --propagation private bash -c '
root=$1 home=$2 scenarios=$3; shift 3
for d in /dev /dev/pts /dev/shm; do mount --bind "$d" "$root$d"; done
mount -t proc proc "$root/proc"
mount -t sysfs sysfs "$root/sys" 2>/dev/null || true
for d in /tmp/.X11-unix "$home" "$scenarios"; do
  [ -d "$d" ] && mkdir -p "$root$d" && mount --bind "$d" "$root$d"
done
mkdir -p "$root/host" && mount --rbind / "$root/host"
cd "$home"
exec chroot "$root" "$@"' _ "$@"
