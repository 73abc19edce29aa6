# shellcheck shell=bash
# The lab itself: plain libvirt and QEMU on plain volumes. If these fail, the others say nothing.
# without: volcrypt
# takes: 85
# always: yes

case_kernel_has_dm_crypt_and_iscsi() {
    modprobe --all dm-crypt iscsi_tcp iscsi_target_mod target_core_file
    expect_contains "$(dmsetup targets)" crypt
    dmsetup create lab-probe --table '0 8 zero'
    expect_eq "$(blockdev --getsz /dev/mapper/lab-probe)" 8
    dmsetup remove --retry lab-probe
}

case_libvirtd_is_confined() {
    expect_contains "$(cat /sys/kernel/security/apparmor/profiles)" 'libvirtd (enforce)'
    virsh --quiet list
    expect_eq "$(cat "/proc/$(pidof libvirtd)/attr/apparmor/current")" 'libvirtd (enforce)'
}

case_attached_lun_is_written_in_clear() {
    target_create plain 16 2
    target_login plain
    domain_define plain
    domain_start plain
    expect_eq "$(cut -c 1-8 "/proc/$(domain_pid plain)/attr/apparmor/current")" libvirt-

    disk_attach plain "$(lun_path plain 1)" sdb
    qemu_io plain sdb 'write -P 0xab 4k 64k'
    qemu_io plain sdb 'flush'
    qemu_io plain sdb 'read -P 0xab 4k 64k'
    expect_fails qemu_io plain sdb 'read -P 0xcd 4k 64k'
    expect_contains "$OUTPUT" 'Pattern verification failed'
    expect_eq "$(xxd -plain -seek 4096 -len 4 "$(lun_backing plain 1)")" abababab

    disk_detach plain sdb
    expect_fails qemu_io plain sdb 'read 0 4k'
    expect_contains "$OUTPUT" 'has no disk sdb'
}

case_target_comes_back_after_its_sessions_end() {
    local before
    before=$(lun_device plain 1)
    target_logout plain
    wait_until 10 test ! -e "$before"
    target_login plain
    expect_eq "$(xxd -plain -seek 4096 -len 4 "$(lun_path plain 1)")" abababab
}

case_reset_leaves_nothing() {
    lab_reset
    expect_eq "$(virsh --quiet list --all)" ''
    expect_fails iscsiadm --mode session
    expect_eq "$(ls /var/lib/lab)" ''
}
