#!/bin/busybox sh
# The first process of the machine (machine.py): loads the modules, makes the RDMA devices rxe0 and rxe1, then carries out the
# commands that come over its second serial port. What it has: an initramfs of busybox and modules, and the host's /
# over 9p, read-only. Written by the machine: /run, /dev/shm (tmpfs).
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
bb=/bin/busybox
$bb mkdir -p /proc /sys /dev /host
$bb mount -t proc proc /proc
$bb mount -t sysfs sysfs /sys
$bb mount -t devtmpfs devtmpfs /dev
while read -r module; do
  $bb insmod "/modules/$module" || echo "insmod $module failed"
done </modules/order
$bb mount -t 9p -o trans=virtio,version=9p2000.L,ro,cache=loose,msize=512000 host /host || echo "mount of / failed"
for place in proc sys dev; do $bb mount -o bind /$place /host/$place; done
$bb mount -t tmpfs tmpfs /host/run
$bb mkdir -p /host/dev/shm /host/dev/pts /host/run/tmp
$bb mount -t tmpfs tmpfs /host/dev/shm
$bb mount -t devpts devpts /host/dev/pts
ulimit -l unlimited

in_host() { $bb chroot /host /bin/bash -c "$1"; } # bash: busybox would take its own `ip`
# rxe refuses lo, so the two NICs get the ends of a veth pair; with 4200 bytes, RDMA packets carry 4096. Both addresses are
# of this machine, and yet what one NIC sends to the other goes over the wire: table 77 is asked before that of local
# addresses. wire_up is run again by who took a link down.
$bb cat >/host/run/wire_up <<'EOF'
ip link set veth0 up && ip link set veth1 up &&
  ip route replace 10.77.1.1 dev veth0 table 77 && ip route replace 10.77.0.1 dev veth1 table 77 &&
  ip neighbour replace 10.77.1.1 lladdr 02:00:00:00:77:01 dev veth0 nud permanent &&
  ip neighbour replace 10.77.0.1 lladdr 02:00:00:00:77:00 dev veth1 nud permanent
EOF
in_host 'ip link set lo up &&
  ip link add veth0 address 02:00:00:00:77:00 mtu 4200 type veth peer name veth1 address 02:00:00:00:77:01 mtu 4200 &&
  ip address add 10.77.0.1/24 dev veth0 && ip address add 10.77.1.1/24 dev veth1 &&
  echo 1 >/proc/sys/net/ipv4/conf/veth0/accept_local && echo 1 >/proc/sys/net/ipv4/conf/veth1/accept_local &&
  ip rule add pref 1 oif veth0 lookup 77 && ip rule add pref 1 oif veth1 lookup 77 &&
  ip rule add pref 2 lookup local && ip rule del pref 0 && bash /run/wire_up &&
  rdma link add rxe0 type rxe netdev veth0 && rdma link add rxe1 type rxe netdev veth1'

# One line, one command; its output, and then a line that begins with RS and holds its status.
port=/dev/ttyS1
$bb stty -F $port raw -echo
exec <$port >$port 2>&1
printf '\036ready\n'
while read -r command; do
  TMPDIR=/run/tmp in_host "$command" </dev/null
  printf '\036%d\n' $?
done
