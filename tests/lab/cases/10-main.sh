# shellcheck shell=bash
# The main job: protected disks of domains at start, at attach and at every kind of end. The last function
# leaves a domain and its volume for 11-reboot.
# takes: 470
# always: yes
# shellcheck disable=SC2154 # Variables of guest/lib.sh.

# A size that is no multiple of anything but the sector: nobody can have rounded it.
odd_size=$((16 * 1024 * 1024 + 512))

case_a_domain_starts_with_one_protected_disk() {
    protect
    # One LUN of the odd size, four of 16 MiB.
    mkdir -p "$lab_store/prot-main"
    truncate --size "$odd_size" "$(lun_backing prot-main 0)"
    for lun in 1 2 3 4; do
        truncate --size 16M "$(lun_backing prot-main $lun)"
    done
    target_login prot-main
    for lun in 0 1 2 3 4; do
        volcrypt volume enrol "$(lun_device prot-main $lun)" >/dev/null
    done
    nothing_left

    domain_define one <(disk_xml "$(lun_path prot-main 0)" sda)
    domain_start one
    expect_eq "$(mappings)" volcrypt-prot-main-0 mappings
    qemu_io one sda 'write -P 0xab 0 64k'
    # The last sector of the volume as well.
    qemu_io one sda "write -P 0xab $((odd_size - 512)) 512"
    qemu_io one sda 'flush'
    expect_only_mappings_open one 0
}

# `virsh shutdown` needs a guest with an operating system, which answers ACPI or runs an agent. What comes of
# it is that QEMU closes its disks and ends by itself; the monitor's quit is the same without a guest.
case_shutdown_leaves_nothing() {
    # QEMU may be gone before its answer has arrived.
    virsh --quiet qemu-monitor-command one '{"execute": "quit"}' >/dev/null 2>&1 || true
    wait_until 30 domain_is_off one
    nothing_left
    expect_ciphertext main 0
}

case_a_domain_starts_with_four_protected_disks() {
    domain_define four \
        <(disk_xml "$(lun_path prot-main 0)" sda) <(disk_xml "$(lun_device prot-main 1)" sdb) \
        <(disk_xml "$(lun_path prot-main 2)" sdc) <(disk_xml "$(lun_device prot-main 3)" sdd)
    domain_start four
    expect_eq "$(mappings | sort)" "$(printf 'volcrypt-prot-main-%s\n' 0 1 2 3)" mappings
    expect_only_mappings_open four 0 1 2 3
    # What the other domain wrote before it was shut down.
    qemu_io four sda 'read -P 0xab 0 64k'
    qemu_io four sda "read -P 0xab $((odd_size - 512)) 512"
    qemu_io four sdb 'write -P 0xb1 0 64k'
    qemu_io four sdc 'write -P 0xb2 0 64k'
    qemu_io four sdd 'write -P 0xb3 0 64k'
    # Each has a key of its own: the same plaintext looks different.
    qemu_io four sdb 'write -P 0xab 64k 4k'
    qemu_io four sdc 'write -P 0xab 64k 4k'
    qemu_io four sdb 'flush'
    qemu_io four sdc 'flush'
    ! cmp --quiet <(sector_at 1 65536) <(sector_at 2 65536) || fail 'two volumes have one ciphertext'
}

case_destroy_leaves_nothing() {
    domain_destroy four
    nothing_left
    expect_ciphertext main 1 b1
    expect_ciphertext main 2 b2
    expect_ciphertext main 3 b3
}

case_a_killed_qemu_leaves_nothing() {
    domain_start four
    expect_eq "$(mappings | wc -l)" 4 'number of mappings'
    qemu_io four sdb 'read -P 0xb1 0 64k'
    qemu_io four sdc 'read -P 0xb2 0 64k'
    qemu_io four sdd 'read -P 0xb3 0 64k'
    qemu_io four sdb 'write -P 0xc1 0 64k'
    kill -KILL "$(domain_pid four)"
    wait_until 30 domain_is_off four
    nothing_left
    expect_ciphertext main 1 c1
    domain_undefine four
}

case_attach_by_link_and_detach() {
    domain_define vm
    domain_start vm
    nothing_left
    disk_attach vm "$(lun_path prot-main 4)" sdb
    expect_eq "$(mappings)" volcrypt-prot-main-4 mappings
    expect_only_mappings_open vm 4
    qemu_io vm sdb 'write -P 0xd4 8k 64k'
    qemu_io vm sdb 'flush'
    expect_ciphertext main 4 d4
    disk_detach vm sdb
    nothing_left
    expect_ciphertext main 4 d4
}

case_attach_by_device_reads_what_was_written() {
    disk_attach vm "$(lun_device prot-main 4)" sdc
    qemu_io vm sdc 'read -P 0xd4 8k 64k'
    expect_fails qemu_io vm sdc 'read -P 0xd5 8k 64k'
    expect_contains "$OUTPUT" 'Pattern verification failed'
    disk_detach vm sdc
    nothing_left
}

case_the_guest_sees_the_exact_size() {
    disk_attach vm "$(lun_path prot-main 0)" sda
    expect_eq "$(virsh domblkinfo vm sda | sed -n 's/^Capacity: *//p')" "$odd_size" 'capacity'
    expect_eq "$(disk_size vm prot-main 0)" "$odd_size" "the guest's size"
    expect_eq "$(blockdev --getsize64 "$(mapping_device prot-main-0)")" "$odd_size" "the mapping's size"
    qemu_io vm sda "read -P 0xab $((odd_size - 512)) 512"
    expect_fails qemu_io vm sda "read $odd_size 512"
}

case_the_command_shows_what_is_mapped() {
    local status mapping volume key now
    now=$(date +%s)
    expect_contains "$(volcrypt status | grep ^prot-main-0)" "$(lun_device prot-main 0)" 'backing device'
    expect_contains "$(volcrypt status | grep ^prot-main-0)" ' vm ' 'domain'
    status=$(volcrypt status --json)
    expect_eq "$(jq '.mappings | length' <<<"$status")" 1 'number of mappings'
    mapping=$(jq '.mappings[0]' <<<"$status")
    expect_json "$mapping" .volume prot-main-0
    expect_json "$mapping" .name volcrypt-prot-main-0
    expect_json "$mapping" .backing "$(lun_device prot-main 0)"
    expect_json "$mapping" .device "$(mapping_device prot-main-0)"
    expect_json "$mapping" .format plain
    expect_json "$mapping" .cipher aes-xts-plain64
    wait_until 30 open_count_is 1
    expect_json "$mapping" .deferred_removal true
    expect_json "$mapping" '.domains | join(",")' vm
    expect_json "$mapping" ".since <= $now and .since > $now - 3600" true
    expect_json "$status" '.guests | map(.domain) | join(",")' vm
    expect_json "$status" '.guests[0].pid' "$(domain_pid vm)"
    expect_json "$status" .configuration_error null

    volume=$(volcrypt volume show prot-main-0 --json)
    expect_json "$volume" .size_bytes "$odd_size"
    expect_json "$volume" .mapped true
    expect_json "$volume" '.domains | join(",")' vm
    expect_contains "$(volcrypt volume show prot-main-0)" 'enrolled, in use by domain vm'
    expect_json "$volume" .device.lun 0
    expect_json "$volume" .device.iscsi_target "$lab_iqn:prot-main"
    expect_contains "$(volcrypt volume show prot-main-0)" "($odd_size bytes)"
    expect_json "$(volcrypt volume list --json)" \
        'map(select(.id | startswith("prot-main-")) | "\(.id)=\(.mapped)") | sort | join(" ")' \
        'prot-main-0=true prot-main-1=false prot-main-2=false prot-main-3=false prot-main-4=false'
    expect_contains "$(volcrypt volume list)" prot-main-4
    expect_fails volcrypt volume show prot-main-9
    expect_contains "$OUTPUT" 'volume prot-main-9 is not enrolled'

    key=$(volcrypt key list --json | jq '.[] | select(.volume == "prot-main-0")')
    expect_json "$key" .key_size 512
    expect_json "$key" .destroyed false
    expect_contains "$(volcrypt key list | grep ^prot-main-0)" usable

    disk_detach vm sda
    nothing_left
    expect_eq "$(volcrypt status --json | jq '.mappings | length')" 0 'number of mappings'
    expect_json "$(volcrypt volume show prot-main-0 --json)" .mapped false
}

# The key is the operator's: anything that can do dm-crypt reads the volume, and what it writes the guest reads.
case_cryptsetup_opens_the_volume_with_the_exported_key() {
    local key=/root/exported.key
    rm -f "$key"
    volcrypt volume export-key prot-main-4 --to "$key"
    expect_eq "$(stat -c '%a %s %U' "$key")" '600 64 root' 'key file'
    expect_fails volcrypt volume export-key prot-main-4 --to "$key"
    expect_contains "$OUTPUT" "$key exists already"

    cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --key-file "$key" --keyfile-size 64 \
        "$(lun_device prot-main 4)" interchange
    expect_eq "$(blockdev --getsize64 /dev/mapper/interchange)" $((16 * 1024 * 1024)) 'size'
    cmp <(head -c 65536 /dev/zero | tr '\0' '\324') <(dd if=/dev/mapper/interchange bs=4k skip=2 count=16 status=none)
    head -c 16384 /dev/zero | tr '\0' '\347' |
        dd of=/dev/mapper/interchange bs=4k seek=100 iflag=fullblock conv=fsync status=none
    wait_until 30 cryptsetup close interchange
    rm "$key"

    disk_attach vm "$(lun_path prot-main 4)" sdb
    qemu_io vm sdb 'read -P 0xe7 400k 16k'
    qemu_io vm sdb 'read -P 0xd4 8k 64k'
    disk_detach vm sdb
    nothing_left
}

# Word for word what Nova 31 sends with os-brick 6.11, but for the device.
case_an_attachment_as_nova_sends_it() {
    local id=0b1f7c1e-1111-4222-8333-444455556666 device live
    device=$(lun_device prot-main 4)
    cat >/root/nova.xml <<XML
<disk type="block" device="disk">
  <driver name="qemu" type="raw" cache="none" discard="unmap" io="native"/>
  <alias name="ua-$id"/>
  <source dev="$device"/>
  <target dev="sdb" bus="scsi"/>
  <serial>$id</serial>
  <address type="drive" controller="0" unit="0"/>
</disk>
XML
    virsh --quiet attach-device vm /root/nova.xml --live
    expect_only_mappings_open vm 4
    qemu_io vm sdb 'read -P 0xe7 400k 16k'

    # Nova finds its disk again by these, so the domain names the caller's device and not the mapping.
    live=$(virsh dumpxml vm)
    expect_contains "$live" "<source dev='$device' index="
    expect_contains "$live" "<serial>$id</serial>"
    expect_contains "$live" "<alias name='ua-$id'/>"
    [[ $live != *volcrypt-* && $live != */dev/dm-* && $live != */dev/mapper* ]] || fail "the XML names the mapping: $live"
    virsh --quiet detach-device vm /root/nova.xml --live
    nothing_left
    [[ $(virsh dumpxml vm) != *"$id"* ]] || fail 'the disk is still part of the domain'
}

case_two_domains_share_one_mapping() {
    domain_define other <(shareable_disk_xml "$(lun_path prot-main 3)" sdb)
    domain_start other
    virsh --quiet attach-device vm <(shareable_disk_xml "$(lun_device prot-main 3)" sdb) --live
    expect_eq "$(mappings)" volcrypt-prot-main-3 mappings
    expect_json "$(volcrypt status --json)" '.mappings[0].domains | sort | join(",")' other,vm
    expect_only_mappings_open vm 3
    expect_only_mappings_open other 3
    qemu_io vm sdb 'write -P 0xf1 0 64k'
    qemu_io vm sdb 'flush'
    qemu_io other sdb 'read -P 0xf1 0 64k'

    disk_detach vm sdb
    wait_until 20 open_count_is 1
    expect_eq "$(mappings)" volcrypt-prot-main-3 mappings
    qemu_io other sdb 'write -P 0xf2 0 64k'
    domain_destroy other
    nothing_left
    expect_ciphertext main 3 f1
    expect_ciphertext main 3 f2
    domain_undefine other
}

# What no rule names is as it was without volcrypt.
case_an_unprotected_lun_stays_as_it_is() {
    local device
    target_create plain 16
    target_login plain
    device=$(lun_device plain)
    expect_fails volcrypt volume enrol "$device"
    expect_contains "$OUTPUT" "no rule protects $device"
    disk_attach vm "$device" sdb a-serial
    nothing_left
    expect_eq "$(open_devices vm)" "$(stat -c %Hr:%Lr "$device")" 'what QEMU has open'
    qemu_io vm sdb 'write -P 0xab 4k 64k'
    qemu_io vm sdb 'flush'
    expect_contains "$(virsh dumpxml vm)" "<source dev='$device' index="
    disk_detach vm sdb
    expect_eq "$(xxd -plain -seek 4096 -len 4 "$(lun_backing plain)")" abababab 'plaintext'
}

case_image_files_stay_as_they_are() {
    local format image
    for format in raw qcow2; do
        image=/var/lib/libvirt/images/lab.$format
        qemu-img create -q -f $format "$image" 16M
        virsh --quiet attach-device vm --live /dev/stdin <<XML
<disk type='file' device='disk'>
  <driver name='qemu' type='$format'/>
  <source file='$image'/>
  <target dev='sdb' bus='scsi'/>
</disk>
XML
        nothing_left
        qemu_io vm sdb 'write -P 0xab 4k 64k'
        qemu_io vm sdb 'read -P 0xab 4k 64k'
        disk_detach vm sdb
        wait_until 20 image_is_free "$image"
        qemu-io -f $format -c 'read -P 0xab 4k 64k' "$image" >/dev/null
        rm "$image"
    done
}

# For 11-reboot: a domain of its own with a disk, and what the command says of its volume.
case_something_is_left_for_the_restart() {
    domain_destroy vm
    domain_undefine vm
    volume_create kept 16
    domain_define kept <(disk_xml "$(lun_path prot-kept)" sda)
    domain_start kept
    qemu_io kept sda 'write -P 0x5a 0 64k'
    qemu_io kept sda 'flush'
    expect_ciphertext kept 0 5a
    volcrypt volume show prot-kept-0 --json | jq 'del(.mapped, .domains)' >/root/kept-volume.json
    keys_listed >/root/kept-keys.json
}

domain_is_off() {
    [ "$(virsh domstate "$1")" = 'shut off' ]
}

# open_devices DOMAIN: the block devices that its QEMU has open, as MAJOR:MINOR, one a line.
open_devices() {
    stat -L -c '%F %Hr:%Lr' "/proc/$(domain_pid "$1")/fd/"* 2>/dev/null |
        sed -n 's/^block special file //p' | sort -u
}

# expect_only_mappings_open DOMAIN LUN...: these volumes' mappings are the only block devices that QEMU has
# open, and above all no LUN.
expect_only_mappings_open() {
    local domain=$1 lun
    shift
    expect_eq "$(open_devices "$domain")" \
        "$(for lun; do stat -c %Hr:%Lr "$(mapping_device "prot-main-$lun")"; done | sort -u)" 'what QEMU has open'
}

# disk_size DOMAIN NAME LUN: what QEMU tells the guest, in bytes.
disk_size() {
    virsh qemu-monitor-command "$1" '{"execute": "query-named-block-nodes"}' |
        jq --arg file "$(lun_path "$2" "$3")" '.return[] | select(.file == $file).image."virtual-size"' | sort -u
}

# sector_at LUN OFFSET: 4 KiB of what stands on the storage server.
sector_at() {
    tail -c "+$(($2 + 1))" "$(lun_backing prot-main "$1")" | head -c 4096
}

shareable_disk_xml() {
    disk_xml "$@" | sed "s|^</disk>|  <shareable/>\n&|"
}

open_count_is() {
    [ "$(volcrypt status --json | jq '.mappings[0].open_count')" = "$1" ]
}

image_is_free() {
    qemu-img info "$1"
}

# expect_json JSON FILTER VALUE
expect_json() {
    expect_eq "$(jq --raw-output "$2" <<<"$1")" "$3" "$2"
}
