# shellcheck shell=bash
# What 10-main left is there after the hypervisor was restarted in good order, with a guest running.
# needs: reboot
# takes: 120
# always: yes

case_nothing_is_mapped_after_a_restart() {
    [ -e /root/kept-volume.json ] || skip '10-main has to run before, and leaves the volume that this file reads'
    wait_until 60 units_are_active
    expect_eq "$(virsh domstate kept)" 'shut off'
    nothing_left
    expect_eq "$(volcrypt status --json | jq -c '[.mappings, .guests, .configuration_error, .key_store_error]')" \
        '[[],[],null,null]' status
}

case_records_and_keys_are_there() {
    [ -e /root/kept-volume.json ] || skip '10-main has to run before'
    expect_eq "$(volcrypt volume show prot-kept-0 --json | jq 'del(.mapped, .domains)')" "$(cat /root/kept-volume.json)"
    expect_eq "$(keys_listed)" "$(cat /root/kept-keys.json)"
}

case_a_domain_reads_what_was_written_before() {
    [ -e /root/kept-volume.json ] || skip '10-main has to run before'
    target_login prot-kept
    # The LUN is back; that alone maps nothing.
    nothing_left
    domain_start kept
    expect_mapped prot-kept-0
    qemu_io kept sda 'read -P 0x5a 0 64k'
    domain_destroy kept
    nothing_left
}

# For 12-crash: flushed, and neither synced on the host nor closed. The volume of 10-main is enrolled for
# long; this one is enrolled right before the power goes, so its record and key have to be safe at once.
case_something_is_left_for_the_power_cut() {
    [ -e /root/kept-volume.json ] || skip '10-main has to run before'
    domain_start kept
    volume_create late 16
    volcrypt volume show prot-late-0 --json | jq 'del(.mapped, .domains)' >/root/late-volume.json
    keys_listed >/root/kept-keys.json
    sync /root/late-volume.json /root/kept-keys.json
    disk_attach kept "$(lun_path prot-late)" sdb
    qemu_io kept sda 'write -P 0x6b 0 64k'
    qemu_io kept sda 'flush'
    qemu_io kept sdb 'write -P 0x7c 1M 64k'
    qemu_io kept sdb 'flush'
    expect_eq "$(mappings | sort)" "$(printf 'volcrypt-prot-%s-0\n' kept late)" mappings
}
