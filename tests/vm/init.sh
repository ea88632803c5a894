#!/bin/busybox sh
# SPDX-License-Identifier: Apache-2.0
#
# /init of the guests' initramfs. Loads the modules, puts the host's root (read-only, by 9p) under an
# overlay of the guest's own, and starts what the host has written to the folder that both share.

B=/bin/busybox
$B mount -t proc proc /proc
$B mount -t sysfs sys /sys
$B mount -t devtmpfs dev /dev

without=,
for word in $($B cat /proc/cmdline); do
	case $word in without=*) without=,${word#without=}, ;; esac
done
while read -r module; do
	case $without in *",${module%.ko},"*) continue ;; esac
	options=
	[ "$module" != dummy.ko ] || options=numdummies=0
	$B insmod "/modules/$module" $options || echo "GUEST: module $module cannot be loaded"
done </modules/order

fail() {
	echo "GUEST: $1"
	$B poweroff -f
}

nine=trans=virtio,version=9p2000.L,msize=262144
$B mount -t 9p -o $nine,cache=loose,ro host /host || fail "the host's root cannot be mounted"
$B mount -t tmpfs -o size=75% overlay /overlay
$B mkdir -p /overlay/upper /overlay/work
$B mount -t overlay -o lowerdir=/host,upperdir=/overlay/upper,workdir=/overlay/work root /root ||
	fail "the overlay cannot be mounted"
$B mount -t proc proc /root/proc
$B mount -t sysfs sys /root/sys
$B mount --bind /dev /root/dev
$B mkdir -p /root/dev/shm /root/dev/pts
$B mount -t tmpfs shm /root/dev/shm
$B mount -t devpts -o ptmxmode=666 pts /root/dev/pts
$B mount -t tmpfs run /root/run
$B mkdir -p /root/run/vm
$B mount -t 9p -o $nine,cache=none share /root/run/vm || fail "the shared folder cannot be mounted"
echo "GUEST: up"
$B chroot /root /bin/bash /run/vm/start
echo "GUEST: ended with status $?"
$B poweroff -f
