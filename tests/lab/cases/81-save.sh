# shellcheck shell=bash
# Domains that are saved to a file and restored: the mapping goes with QEMU and comes again, and what is refused loses
# nothing.
# takes: 260

file=/var/tmp/saved.save
managed=/var/lib/libvirt/qemu/save/saved.save
volume=prot-save-0

case_a_saved_domain_has_no_mapping_and_is_restored() {
    protect
    volume_create save 16
    domain_define saved <(disk_xml "$(lun_path prot-save)" sda)
    domain_start saved
    qemu_io saved sda 'write -P 0xab 0 64k'
    virsh --quiet save saved "$file"
    nothing_left
    expect_ciphertext save
    virsh --quiet restore "$file"
    is_restored
}

case_a_managed_save_is_restored() {
    virsh --quiet managedsave saved
    nothing_left
    domain_start saved
    is_restored
    [ ! -e "$managed" ] || fail 'the managed save was not used up'
}

case_a_refused_restore_leaves_the_file() {
    virsh --quiet save saved "$file"
    volcrypt volume retire "$volume" >/dev/null
    expect_fails virsh restore "$file"
    expect_contains "$OUTPUT" "volcrypt: disk sda: volume $volume is retired"
    nothing_left
    volcrypt volume enrol "$(lun_path prot-save)" >/dev/null

    target_logout prot-save
    expect_fails virsh restore "$file"
    expect_contains "$OUTPUT" "$(lun_path prot-save)"
    target_login prot-save
    virsh --quiet restore "$file"
    is_restored
}

# libvirt deletes the file when the hook that it calls first refuses.
case_a_refused_start_leaves_the_managed_save() {
    virsh --quiet managedsave saved
    volcrypt volume retire "$volume" >/dev/null
    expect_fails virsh start saved
    expect_contains "$OUTPUT" "volcrypt: disk sda: volume $volume is retired"
    [ -s "$managed" ] || fail 'the managed save is gone'
    volcrypt volume enrol "$(lun_path prot-save)" >/dev/null

    systemctl stop volcryptd.socket volcryptd-control.socket volcryptd
    expect_fails virsh start saved
    expect_contains "$OUTPUT" 'volcrypt: volcryptd cannot be reached'
    [ -s "$managed" ] || fail 'the managed save is gone'
    systemctl start volcryptd.socket volcryptd-control.socket volcryptd
    nothing_left
    domain_start saved
    is_restored
}

# The definition may have been adopted since; libvirt goes by the XML in the file.
case_a_managed_save_from_before_the_wrapper_is_restored_with_it() {
    virsh --quiet managedsave saved
    virsh managedsave-dumpxml saved | sed 's#/usr/libexec/volcrypt/emulators/#/usr/bin/#' >/root/saved.xml
    grep -q '<emulator>/usr/bin/' /root/saved.xml
    virsh --quiet managedsave-define saved /root/saved.xml
    expect_contains "$(virsh managedsave-dumpxml saved)" '<emulator>/usr/bin/' 'XML in the file'
    domain_start saved
    is_restored
    expect_contains "$(virsh dumpxml saved)" '<emulator>/usr/libexec/volcrypt/emulators/' 'emulator'
}

# As a host leaves it that points disks to mappings in the XML.
case_a_managed_save_that_names_a_mapping_is_restored() {
    virsh --quiet managedsave saved
    virsh managedsave-dumpxml saved | volcrypt rewrite >/root/saved.xml
    grep -q "<source dev=./dev/mapper/volcrypt-$volume." /root/saved.xml
    virsh --quiet managedsave-define saved /root/saved.xml
    expect_contains "$(virsh managedsave-dumpxml saved)" "/dev/mapper/volcrypt-$volume" 'XML in the file'
    domain_start saved
    is_restored
    expect_contains "$(virsh dumpxml saved)" "<source dev='$(lun_path prot-save)'" 'disk'
    domain_destroy saved
    nothing_left
    rm "$file"
}

is_restored() {
    expect_eq "$(virsh domstate saved --reason)" 'running (restored)' 'state'
    expect_eq "$(mappings)" "volcrypt-$volume" mappings
    qemu_io saved sda 'read -P 0xab 0 64k'
}
