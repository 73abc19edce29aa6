# shellcheck shell=bash
# shellcheck disable=SC2154 # The helpers that are sourced first assign what is not assigned here.
# A volume is what the kernel says of its device, never the path or the number it has at the moment.
# takes: 480

# domain NAME: runs, without disks.
domain() {
    [ "$(virsh --quiet domstate "$1" 2>/dev/null)" != running ] || return 0
    domain_define "$1"
    domain_start "$1"
}

# identified DEVICE LINE...: each of the lines is in what `volume identify` says.
identified() {
    local device=$1 said line
    shift
    said=$(volcrypt volume identify "$device")
    for line; do
        grep -qxF -- "$line" <<<"$said" || fail "'$line' is not in what is said of $device: $said"
    done
}

# attach_refused DOMAIN DEVICE ERRNO SENTENCE
attach_refused() {
    local since
    since=$(date +@%s.%6N)
    expect_fails disk_attach "$1" "$2" sdb
    expect_contains "$OUTPUT" "$3" 'what virsh said'
    (wait_until 10 said "$since" "$4") || fail "expected '$4' in the journal: $(journal_since "$since")"
    nothing_left
}

# said SINCE SENTENCE
said() {
    [[ $(journal_since "$1") == *"$2"* ]]
}

wwid() {
    cat "/sys/block/$(basename "$1")/device/wwid"
}

# writes DOMAIN: 24 blocks of 64 KiB, the first of them filled with 0x01.
writes() {
    local block
    for ((block = 0; block < 24; block++)); do
        [ "$block" -ne 20 ] || wait_until 300 test -e /run/lab-mp.gone
        qemu_io "$1" sdb "write -P $((block + 1)) $((block * 64))k 64k" || return
        : >"/run/lab-mp.$block"
    done
}

case_one_lun_over_two_portals() {
    local first second map block writer
    protect
    target_create prot-mp 8
    target_login prot-mp
    first=$(lun_device prot-mp)
    portal_login prot-mp 127.0.0.2
    second=$(lab_portal=127.0.0.2:3260 lun_device prot-mp)
    [ "$first" != "$second" ] || fail 'there is one path only'
    multipath_on
    wait_until 30 multipath_map "$first"
    wait_until 30 multipath_map "$second"
    map=$(multipath_map "$first")
    expect_eq "$(multipath_map "$second")" "$map" 'map of the other path'
    udevadm settle --timeout 180

    identified "$map" "WWID:            $(wwid "$first")" "iSCSI target:    $lab_iqn:prot-mp" \
        "dm UUID:         mpath-3$(wwid "$first" | sed 's/^naa.//')" '  portal:          127.0.0.1:3260' \
        '  portal:          127.0.0.2:3260' 'outcome:         protected as volume prot-mp-0 by rule lab'
    identified "$first" "path of:         $map"
    expect_fails volcrypt volume enrol "$first"
    expect_contains "$OUTPUT" "give the guest $map"
    volcrypt volume enrol "$map" >/dev/null

    domain mp
    attach_refused mp "$first" 'Permission denied' \
        "$first is one path of the multipath map $map to the protected volume prot-mp-0; give the guest $map"
    disk_attach mp "$map" sdb
    expect_mapped prot-mp-0
    expect_eq "$(dmsetup deps -o blkdevname volcrypt-prot-mp-0)" \
        "1 dependencies	: ($(basename "$(readlink -e "$map")"))" 'what the mapping stands on'

    rm -f /run/lab-mp.*
    writes mp >/run/lab-mp.log 2>&1 &
    writer=$!
    wait_until 60 test -e /run/lab-mp.3
    portal_logout prot-mp 127.0.0.1
    [ ! -e /run/lab-mp.23 ] || fail 'the path went when everything was written'
    : >/run/lab-mp.gone
    wait "$writer" || fail "writing without one path: $(cat /run/lab-mp.log)"
    for block in 0 3 12 23; do
        qemu_io mp sdb "read -P $((block + 1)) $((block * 64))k 64k" >/dev/null
        expect_ciphertext mp 0 "$(printf %02x $((block + 1)))"
    done
    disk_detach mp sdb
    nothing_left

    # Enrolled through the map, it opens through a path that no map has taken.
    portal_login prot-mp 127.0.0.1
    multipath_off
    disk_attach mp "$(lun_path prot-mp)" sdb
    qemu_io mp sdb 'read -P 24 1472k 64k' >/dev/null
    disk_detach mp sdb
    nothing_left
    domain_undefine_running mp
    portal_logout prot-mp 127.0.0.2
    target_logout prot-mp
}

# domain_undefine_running NAME
domain_undefine_running() {
    domain_destroy "$1"
    domain_undefine "$1"
}

# alone NAME: of the three targets only this one is logged in to; the name of its disk is in $device.
alone() {
    local name
    for name in prot-na prot-nb nc; do
        [ ! -e "$(lun_path "$name")" ] || target_logout "$name"
    done
    udevadm settle --timeout 180
    target_login "$1"
    device=$(lun_device "$1")
}

# through DOMAIN DEVICE COMMAND: attaches the device, has QEMU do it, and detaches.
through() {
    disk_attach "$1" "$2" sdb
    qemu_io "$1" sdb "$3" >/dev/null
    disk_detach "$1" sdb
    nothing_left
}

case_a_name_goes_to_another_lun() {
    local device name
    protect
    for name in prot-na prot-nb nc; do
        target_create "$name" 4
        alone "$name"
        echo "$device" >>/run/lab-names
        [ "$name" = nc ] || volcrypt volume enrol "$device" >/dev/null
    done
    expect_eq "$(sort -u /run/lab-names | wc -l)" 1 'names of three disks'
    rm /run/lab-names
    domain na
    alone prot-na
    identified "$device" 'outcome:         protected as volume prot-na-0 by rule lab'
    through na "$device" 'write -P 0x11 0 64k'
    alone prot-nb
    identified "$device" 'outcome:         protected as volume prot-nb-0 by rule lab'
    disk_attach na "$device" sdb
    expect_mapped prot-nb-0
    expect_fails qemu_io na sdb 'read -P 0x11 0 64k'
    disk_detach na sdb
    nothing_left
    through na "$device" 'write -P 0x22 0 64k'
    alone nc
    identified "$device" 'outcome:         not protected'
    through na "$device" 'write -P 0x33 0 64k'
    alone prot-na
    through na "$device" 'read -P 0x11 0 64k'
    alone prot-nb
    through na "$device" 'read -P 0x22 0 64k'
    expect_ciphertext na 0 11
    expect_ciphertext nb 0 22
    LC_ALL=C grep -qaP '\x33{32}' "$(lun_backing nc)" || fail 'what nobody protects is not in clear'
    ! LC_ALL=C grep -qaP '\x11{32}|\x22{32}' "$(lun_backing nc)" || fail 'the data are mixed up'
    target_logout prot-nb
    domain_undefine_running na
}

case_a_lun_number_goes_to_a_new_volume() {
    local enrolled found
    protect 'create_keys = true'
    target_create prot-nw 4
    target_login prot-nw
    enrolled=$(wwid "$(lun_device prot-nw)")
    domain nw
    through nw "$(lun_path prot-nw)" 'write -P 0x44 0 64k'
    target_logout prot-nw
    lun_renew prot-nw 0 another
    target_login prot-nw
    found=$(wwid "$(lun_device prot-nw)")
    [ "$enrolled" != "$found" ] || fail 'the new volume has the WWID of the old one'
    identified "$(lun_device prot-nw)" "WWID:            $found" "LUN:             0"
    attach_refused nw "$(lun_path prot-nw)" 'Wrong medium type' \
        "is not the device that volume prot-nw-0 was enrolled on: its WWID was \"$enrolled\" and is \"$found\"; nothing was written to it"
    sync
    ! LC_ALL=C grep -qaP '[^\x00]' "$(lun_backing prot-nw)" || fail 'something was written to the new volume'
    target_logout prot-nw
    domain_undefine_running nw
}

# daemons: the processes of those that have to survive.
daemons() {
    systemctl show --property MainPID --value libvirtd volcryptd
}

case_a_device_goes_under_a_running_guest() {
    local before device
    protect
    volume_create gone 4
    domain go
    device=$(lun_device prot-gone)
    disk_attach go "$(lun_path prot-gone)" sdb
    qemu_io go sdb 'write -P 0x55 0 64k' >/dev/null
    qemu_io go sdb flush >/dev/null
    before=$(daemons)
    echo 1 >"/sys/block/$(basename "$device")/device/delete"
    [ ! -e "/sys/block/$(basename "$device")" ] || fail 'the device has not gone'
    expect_fails qemu_io go sdb 'write -P 0x66 0 64k'
    expect_contains "$OUTPUT" 'Input/output error'
    expect_fails qemu_io go sdb 'read 1M 64k'
    expect_eq "$(virsh --quiet domstate go)" running 'domain go'
    disk_detach go sdb
    nothing_left
    expect_fails volcrypt volume identify "$device"
    expect_eq "$(daemons)" "$before" 'processes of the daemons'
    target_logout prot-gone
    target_login prot-gone
    through go "$(lun_path prot-gone)" 'read -P 0x55 0 64k'
    target_logout prot-gone
    domain_undefine_running go
}

case_logical_volumes() {
    local name
    protect
    for name in prot-lv lv; do
        target_create "$name" 16
        target_login "$name"
    done
    volume_group protected "$(lun_device prot-lv)"
    volume_group plain "$(lun_device lv)"
    identified /dev/protected/lv "device:          /dev/mapper/protected-lv ($(lsblk -dno MAJ:MIN /dev/protected/lv | tr -d ' '))" \
        "LVM volume UUID: $(LVM_SUPPRESS_FD_WARNINGS=1 lvs --noheadings -o lv_uuid protected/lv | tr -d ' ')" \
        'outcome:         refused: /dev/mapper/protected-lv stands on the protected volume prot-lv-0; give the guest the whole volume'
    identified /dev/plain/lv 'outcome:         not protected'
    domain lv
    attach_refused lv /dev/protected/lv 'Permission denied' \
        '/dev/mapper/protected-lv stands on the protected volume prot-lv-0; give the guest the whole volume'
    through lv /dev/plain/lv 'write -P 0x77 0 64k'
    sync
    LC_ALL=C grep -qaP '\x77{32}' "$(lun_backing lv)" || fail 'the logical volume is not written in clear'

    # An image file is known by its inode.
    truncate --size 1M /var/lib/libvirt/images/lv.img
    identified /var/lib/libvirt/images/lv.img 'outcome:         not protected: no rule protects image files' \
        "image file:      inode $(stat -c %i /var/lib/libvirt/images/lv.img) of device $(mountpoint --fs-devno /)"
    rm /var/lib/libvirt/images/lv.img
    expect_eq "$(volcrypt volume identify "$(lun_device prot-lv)" --json | jq --raw-output '.device.policy.outcome.protected.volume')" \
        prot-lv-0 'volume in the JSON'
    domain_undefine_running lv
    wait_until 30 lvm_quiet vgchange --quiet --activate n plain protected
}
