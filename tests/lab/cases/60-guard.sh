# shellcheck shell=bash
# shellcheck disable=SC2154 # The helpers that are sourced first assign what is not assigned here.
# No way around: a guest that runs without the wrapper cannot open a protected volume, whatever became of the
# daemon, and its domain is given the wrapper and released from it again.
# takes: 410
# LUNs of prot-guard: 0 and 1, both enrolled. Target `free` is not protected. Domain `plain` runs without the
# wrapper, as one that was started before the package was installed; domain `wrapped` runs with it.

guard_emulator=/usr/bin/qemu-system-x86_64
guard_wrapper=/usr/libexec/volcrypt/emulators/qemu-system-x86_64

# lax [LINE...]: domains without the wrapper may start; further lines go into the configuration.
lax() {
    protect '[hook]' 'other_emulators = "start"' "$@"
}

# ready: both domains run and the guard is on.
ready() {
    [ "$(virsh --quiet domstate wrapped 2>/dev/null)" != running ] || return 0
    modprobe sg
    lax
    volume_create guard 8 2
    target_create free 8
    target_login free
    domain_define wrapped
    domain_define plain
    with_emulator plain "$guard_emulator"
    domain_start plain
    domain_start wrapped
    guard_sums >/run/lab-guard.sums
}

# with_emulator NAME PATH: has libvirt keep that emulator.
with_emulator() {
    virsh --quiet dumpxml "$1" --inactive | sed "s,<emulator>.*<,<emulator>$2<," >/run/lab-emulator.xml
    virsh --quiet define /run/lab-emulator.xml >/dev/null
}

guard_sums() {
    sync
    sha256sum "$(dirname "$(lun_backing prot-guard)")"/*
}

# guard_status FILTER: of the part of the status that is about the guard.
guard_status() {
    volcrypt status --json | jq --raw-output ".guard$1"
}

# kept_out NAME [LUN]: the unwrapped guest does not get the LUN of target NAME, and nothing was written to it.
kept_out() {
    expect_fails disk_attach plain "$(lun_path "$@")" sdb
    expect_contains "$OUTPUT" 'Operation not permitted' 'what virsh said'
    expect_eq "$(guard_sums)" "$(cat /run/lab-guard.sums)" 'checksums of the LUNs'
    [[ $(virsh --quiet domblklist plain) != *sdb* ]] || fail 'the unwrapped guest has the disk'
}

# below_the_guard PROGRAM ARGUMENT...: as a process of the guests' cgroup, root though it is.
below_the_guard() {
    systemd-run --quiet --wait --pipe --collect --slice=machine.slice "$@"
}

# is_shut PATH: for the guests' cgroup, and open for the host.
is_shut() {
    expect_fails below_the_guard dd if="$1" of=/dev/null bs=512 count=0
    expect_contains "$OUTPUT" 'Operation not permitted' "$1"
    dd if="$1" of=/dev/null bs=512 count=0 status=none
}

# is_open PATH: for the guests' cgroup.
is_open() {
    below_the_guard dd if="$1" of=/dev/null bs=512 count=0 status=none
}

case_an_unwrapped_guest_gets_no_protected_volume() {
    ready
    expect_eq "$(guard_status .on)" true 'the guard'
    expect_eq "$(guard_status .cgroup)" machine.slice 'the cgroup'
    expect_contains "$(volcrypt status)" 'The guard is on: '
    kept_out prot-guard 0
    kept_out prot-guard 1
    nothing_left
    expect_contains "$(volcrypt doctor || true)" \
        "domain plain runs without volcrypt's wrapper (its emulator is $guard_emulator): protected volumes cannot be attached to it"
}

case_a_wrapped_guest_gets_its_mapping() {
    ready
    disk_attach wrapped "$(lun_path prot-guard 0)" sdb
    expect_mapped prot-guard-0
    qemu_io wrapped sdb 'write -P 0xab 0 64k'
    qemu_io wrapped sdb 'read -P 0xab 0 64k'
    is_shut "$(lun_device prot-guard 0)"
    disk_detach wrapped sdb
    nothing_left
    expect_ciphertext guard 0
    guard_sums >/run/lab-guard.sums
}

case_an_unprotected_volume_is_open_to_both() {
    local domain
    ready
    for domain in plain wrapped; do
        disk_attach "$domain" "$(lun_path free)" sdc
        qemu_io "$domain" sdc 'write -P 0xcd 0 4k'
        disk_detach "$domain" sdc
    done
    LC_ALL=C grep -qaP '\xcd{32}' "$(lun_backing free)" || fail 'nothing was written to the unprotected volume'
}

# Partitions and stacks show the same bytes, and SCSI commands pass by every block device.
case_what_leads_to_a_protected_volume_is_shut_too() {
    local device generic
    ready
    device=$(lun_device prot-guard 1)
    for generic in "/sys/block/${device##*/}/device"/{scsi_generic,bsg}/*; do
        generic=${generic##*/}
        [ ! -e "/dev/bsg/$generic" ] || generic=bsg/$generic
        below_the_guard test -c "/dev/$generic"
        expect_fails below_the_guard sh -c "exec 3<>/dev/$generic"
        expect_contains "$OUTPUT" 'Operation not permitted' "/dev/$generic"
        (exec 3<>"/dev/$generic")
    done
    dmsetup create lab-stack --table "0 8192 linear $device 0"
    wait_until 10 is_shut /dev/mapper/lab-stack
    dmsetup remove --retry lab-stack
    # The same number, but another device.
    dmsetup create lab-stack --table "0 8192 linear $(lun_device free) 0"
    wait_until 10 is_open /dev/mapper/lab-stack
    dmsetup remove --retry lab-stack
    # A node can be made all the same: libvirt makes them for its guests.
    below_the_guard mknod /run/lab-guard-node b 8 0
    rm /run/lab-guard-node
}

case_a_volume_that_comes_is_guarded_at_once() {
    local before device
    ready
    before=$(guard_status .devices)
    target_create prot-late 8
    target_login prot-late
    device=$(lun_device prot-late)
    wait_until 30 is_shut "$device"
    kept_out prot-late
    [ "$(guard_status .devices)" -gt "$before" ] || fail 'no device more is shut'
    target_logout prot-late
    wait_until 10 test ! -e "$device"
    wait_until 10 devices_are "$before"
    # Its number goes to the next one, which is not protected, once nobody has the old one open.
    udevadm settle --timeout 180
    target_create other 8
    target_login other
    expect_eq "$(lun_device other)" "$device" 'the name of the next device'
    wait_until 30 is_open "$device"
    target_logout other
    target_delete other
    target_delete prot-late
}

devices_are() {
    [ "$(guard_status .devices)" = "$1" ]
}

case_it_outlives_the_daemon() {
    ready
    systemctl stop volcryptd.service volcryptd.socket volcryptd-control.socket
    kept_out prot-guard 0
    systemctl start volcryptd.socket volcryptd-control.socket volcryptd.service
    kept_out prot-guard 0
    systemctl kill --signal=KILL volcryptd
    kept_out prot-guard 0
    wait_until 30 volcrypt status
    # One program and no more, however often the daemon started.
    systemctl restart volcryptd
    expect_eq "$(guard_programs)" 1 'guards on the cgroup'
    kept_out prot-guard 1
    is_open "$(lun_device free)"
    # With a faulty configuration nobody knows what is protected.
    lax 'nonsense'
    kept_out prot-guard 0
    is_shut "$(lun_device free)"
    expect_contains "$(volcrypt status)" 'every block device is shut for machine.slice'
    lax
    kept_out prot-guard 0
    is_open "$(lun_device free)"
    disk_attach wrapped "$(lun_path prot-guard 0)" sdb
    disk_detach wrapped sdb
    nothing_left
}

# guard_programs: how many of them are on the guests' cgroup. Linux counts attached programs nowhere in /sys or
# /proc, so this asks bpf(2): BPF_PROG_QUERY is 16, BPF_CGROUP_DEVICE 6.
guard_programs() {
    python3 - <<'PYTHON'
import ctypes, os, struct
cgroup = os.open("/sys/fs/cgroup/machine.slice", os.O_RDONLY)
ids = (ctypes.c_uint32 * 64)()
attributes = ctypes.create_string_buffer(struct.pack("<IIIIQI", cgroup, 6, 0, 0, ctypes.addressof(ids), 64), 128)
if ctypes.CDLL(None, use_errno=True).syscall(321, 16, attributes, 128) != 0:
    raise OSError(ctypes.get_errno(), "bpf")
print(struct.unpack_from("<I", attributes, 24)[0])
PYTHON
}

case_it_is_put_on_a_new_cgroup() {
    ready
    lab_reset_domains
    systemctl stop machine.slice
    wait_until 30 test ! -d /sys/fs/cgroup/machine.slice
    expect_eq "$(guard_status .on)" false 'the guard without a cgroup'
    systemctl start machine.slice
    wait_until 2 is_shut "$(lun_device prot-guard 0)"
    expect_eq "$(guard_status .on)" true 'the guard'
    domain_start plain
    domain_start wrapped
    kept_out prot-guard 0
}

lab_reset_domains() {
    domain_destroy plain
    domain_destroy wrapped
}

case_status_and_doctor_say_that_it_is_off() {
    local said
    ready
    lax '[guard]' 'cgroup = "nowhere.slice"'
    said=$(volcrypt status)
    expect_contains "$said" 'warning: the guard is off: there is no cgroup /sys/fs/cgroup/nowhere.slice: run '
    expect_contains "$(volcrypt doctor || true)" \
        'warn  guard: it is off, so guests without the wrapper could open protected volumes in clear: there is no cgroup'
    lax '[guard]' 'enabled = false'
    expect_contains "$(volcrypt status)" 'warning: the guard is off: it is switched off'
    expect_eq "$(guard_programs)" 0 'guards on the cgroup'
    # That it was the guard that kept it out.
    is_open "$(lun_device prot-guard 0)"
    disk_attach plain "$(lun_path prot-guard 1)" sdb
    disk_detach plain sdb
    lax
    expect_eq "$(guard_status .on)" true 'the guard'
    kept_out prot-guard 1
}

case_a_domain_is_adopted_and_released() {
    ready
    domain_define other <(disk_xml "$(lun_path prot-guard 0)" sda)
    with_emulator other "$guard_emulator"
    virsh --quiet metadata other https://example.org/lab --key lab --set '<owner><name>A &amp; B</name></owner>' >/dev/null
    virsh dumpxml other --inactive --security-info >/run/lab-before.xml
    expect_fails domain_start other
    expect_contains "$OUTPUT" "run 'volcrypt domain adopt other'"

    expect_contains "$(volcrypt domain adopt other)" "runs $guard_wrapper instead of $guard_emulator"
    expect_contains "$(volcrypt domain adopt other)" 'already'
    expect_contains "$(virsh dumpxml other --inactive)" "<emulator>$guard_wrapper</emulator>"
    expect_contains "$(virsh metadata other https://example.org/lab)" 'A &amp; B'
    domain_start other
    expect_mapped prot-guard-0
    qemu_io other sda 'read -P 0xab 0 64k'
    domain_destroy other
    nothing_left

    volcrypt domain release other
    virsh dumpxml other --inactive --security-info >/run/lab-after.xml
    cmp /run/lab-before.xml /run/lab-after.xml || fail "$(diff /run/lab-before.xml /run/lab-after.xml)"
    expect_contains "$(volcrypt domain release other)" 'was not adopted'
    domain_undefine other

    # Without any metadata of its own; and while it runs.
    virsh dumpxml plain --inactive >/run/lab-before.xml
    expect_contains "$(volcrypt domain adopt plain)" 'virsh shutdown plain; virsh start plain'
    kept_out prot-guard 0
    domain_destroy plain
    domain_start plain
    disk_attach plain "$(lun_path prot-guard 0)" sdb
    expect_mapped prot-guard-0
    volcrypt domain release plain
    virsh dumpxml plain --inactive >/run/lab-after.xml
    cmp /run/lab-before.xml /run/lab-after.xml || fail "$(diff /run/lab-before.xml /run/lab-after.xml)"
    domain_destroy plain
    nothing_left
}

case_what_cannot_be_adopted_gets_a_sentence() {
    ready
    expect_fails volcrypt domain adopt none-such
    expect_contains "$OUTPUT" 'there is no domain none-such'
    expect_contains "$(volcrypt domain adopt wrapped)" "names volcrypt's wrapper as its emulator already"
    expect_contains "$(volcrypt domain release wrapped)" 'was not adopted'
    virsh --quiet dumpxml wrapped --inactive | sed 's,<name>.*<,<name>fleeting<,; /<uuid>/d' >/run/lab-fleeting.xml
    virsh --quiet create /run/lab-fleeting.xml >/dev/null
    expect_fails volcrypt domain adopt fleeting
    expect_contains "$OUTPUT" 'domain fleeting is transient'
    domain_destroy fleeting
    ! compgen -G '/run/libvirt/qemu/fleeting*' >/dev/null || fail 'the transient domain is left'
}
