#!/bin/bash
# The transcript of tests/demo, made in the lab's machine: every command is printed and then really run.
set -euo pipefail

# shellcheck source=tests/lab/guest/lib.sh
. /lab/files/guest/lib.sh

say() {
    printf '\n# %s\n' "$*"
}

show() {
    printf '$ %s\n' "$*"
    eval "$*"
}

say "A storage server offers a LUN of 64 MiB, as Cinder would name it; this host has logged in to it."
# shellcheck disable=SC2034 # The helpers read it.
lab_iqn=iqn.2010-10.org.openstack
id=0b1f7c1e-1111-4222-8333-444455556666
target_create "volume-$id" 64
target_login "volume-$id"
disk=$(lun_path "volume-$id")
lun=$(lun_backing "volume-$id")
show "ls -l $disk"

say "One rule has Cinder's volumes protected."
cat >/etc/volcrypt/volcrypt.toml <<'TOML'
[[rules]]
name = "cinder"
iscsi_target = 'iqn\.2010-10\.org\.openstack:volume-(?<id>[0-9a-f-]{36})'
volume_id = "${id}"
lun = 0
TOML
show "cat /etc/volcrypt/volcrypt.toml"
show "volcrypt config check"
show "systemctl restart volcryptd"

say "The volume is new and blank, so it may be enrolled: it gets a key of its own."
show "volcrypt volume enrol $disk"

say "A guest runs. It is an ordinary domain; nothing in its XML knows of volcrypt."
domain_define guest
show "virsh start guest"

say "An ordinary attach-device, with the XML that Nova would send."
disk_xml "$disk" sda "$id" >/root/disk.xml
show "cat /root/disk.xml"
show "virsh attach-device guest /root/disk.xml --live"
show "volcrypt status"
show "dmsetup table"
show "ls -l /proc/$(domain_pid guest)/fd | grep -o '/dev/[ds][dm].*'"

say "The guest's QEMU writes 1 MiB of the byte 0x61, the letter a, and reads it back."
show "qemu_io guest sda 'write -P 0x61 0 1M'"
show "qemu_io guest sda 'flush'"
show "qemu_io guest sda 'read -P 0x61 0 1M'"

say "The same sectors as the storage server has them: no letter a, only ciphertext."
sync
show "xxd -l 64 $lun"
show "! grep -c aaaaaaaa $lun"

say "Detached: the kernel has removed the mapping and forgotten the key."
show "virsh detach-device guest /root/disk.xml --live"
no_mapping() {
    ! dmsetup ls | grep volcrypt- >/dev/null
}
wait_until 20 no_mapping
show "volcrypt status"
show "dmsetup ls"
show "volcrypt volume list"
virsh --quiet destroy guest
