# shellcheck shell=bash
# Two hypervisors ask one KMIP server: what the one has enrolled the other opens, and no key is carried between them. The
# first also is the storage server.
# machines: two
# takes: 200

# shellcheck disable=SC2034,SC2154 # The helpers read them, or set them.
lab_portal=192.168.77.1:3260
volume=prot-shared-0

case_two_hosts_ask_one_kmip_server() {
    local keys
    first host_join 1
    second host_join 2
    servers_reached
    servers_reached_by_second
    keys=$(servers config kmip)
    # Neither knows anything, whatever ran before.
    first forget_all
    second forget_all
    first keys_on "$keys"
    second keys_on "$keys"
    first volume_create shared 16
    second target_join prot-shared
    expect_eq "$(second volcrypt volume list --json)" '[]' 'what the second host knows'
}

case_what_the_one_enrolled_the_other_opens() {
    first guest_on_shared
    first qemu_io vm sda 'write -P 0xa5 0 64k'
    first domain_destroy vm
    first nothing_left
    first expect_ciphertext shared 0 a5
    second guest_on_shared
    second qemu_io vm sda 'read -P 0xa5 0 64k'
    second qemu_io vm sda 'write -P 0xb5 64k 64k'
    second domain_destroy vm
    second domain_undefine vm
    second nothing_here
    expect_eq "$(second keys_in_the_database)" 0 'keys in the database of the second host'
    expect_eq "$(second what_is_known)" "$(first what_is_known)" 'the record that travels with the key'
}

case_a_guest_migrates_there_and_back() {
    first domain_start vm
    first qemu_io vm sda 'read -P 0xb5 64k 64k'
    first migrate_to hv2
    first nothing_left
    second expect_mapped "$volume"
    second qemu_io vm sda 'read -P 0xa5 0 64k'
    second qemu_io vm sda 'write -P 0xc5 128k 64k'
    second migrate_to hv1
    second nothing_here
    first expect_mapped "$volume"
    first qemu_io vm sda 'read -P 0xc5 128k 64k'
}

# One that begins to ask while the server is away has no key; the guest stays where it is.
case_a_host_that_cannot_ask_is_refused() {
    servers stop kmip
    expect_fails first migrate_to hv2
    expect_contains "$OUTPUT" 'volcrypt: host hv2: disk sda: no KMIP server could be asked for the key'
    echo "$OUTPUT"
    first expect_mapped "$volume"
    second nothing_here
    servers start kmip
    first domain_destroy vm
    first nothing_left
}

forget_all() {
    stop_daemon
    rm -rf /var/lib/volcrypt/*
}

# guest_on_shared: a domain on the volume.
guest_on_shared() {
    [ -e /etc/libvirt/qemu/vm.xml ] || domain_define vm <(disk_xml "$(lun_path prot-shared)" sda)
    domain_start vm
    expect_mapped "$volume"
}

keys_in_the_database() {
    sqlite3 -readonly /var/lib/volcrypt/volcrypt.db 'SELECT count(*) FROM keys'
}

# what_is_known: of the volume, but for what is of this host and of this moment.
what_is_known() {
    volcrypt volume list --json | jq --compact-output --sort-keys \
        'map({id, check_value, cipher, key_size, sector_size, size, owner})'
}
