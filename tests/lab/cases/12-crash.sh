# shellcheck shell=bash
# What the guest flushed in 11-reboot is there after the hypervisor's power was cut, with two volumes mapped.
# needs: crash
# takes: 110
# always: yes

case_nothing_is_left_over_after_a_power_cut() {
    [ -e /root/late-volume.json ] || skip '11-reboot has to run before, and leaves the volumes that this file reads'
    wait_until 60 units_are_active
    nothing_left
    expect_eq "$(volcrypt status --json | jq -c '[.mappings, .guests, .configuration_error, .key_store_error]')" \
        '[[],[],null,null]' status
    expect_eq "$(ls -A /run/volcrypt)" "$(printf '%s\n' control.sock wrapper.sock)" '/run/volcrypt'
}

case_records_and_keys_are_there() {
    [ -e /root/late-volume.json ] || skip '11-reboot has to run before'
    expect_eq "$(volcrypt volume show prot-kept-0 --json | jq 'del(.mapped, .domains)')" "$(cat /root/kept-volume.json)"
    expect_eq "$(volcrypt volume show prot-late-0 --json | jq 'del(.mapped, .domains)')" "$(cat /root/late-volume.json)"
    expect_eq "$(keys_listed)" "$(cat /root/kept-keys.json)"
    expect_eq "$(sqlite3 -readonly /var/lib/volcrypt/volcrypt.db 'PRAGMA integrity_check')" ok 'database'
}

case_a_domain_reads_what_it_flushed() {
    [ -e /root/late-volume.json ] || skip '11-reboot has to run before'
    target_login prot-kept
    target_login prot-late
    domain_start kept
    qemu_io kept sda 'read -P 0x6b 0 64k'
    disk_attach kept "$(lun_path prot-late)" sdb
    qemu_io kept sdb 'read -P 0x7c 1M 64k'
    domain_destroy kept
    nothing_left
    expect_ciphertext kept 0 6b
    expect_ciphertext late 0 7c
    rm /root/kept-volume.json /root/late-volume.json /root/kept-keys.json
}
