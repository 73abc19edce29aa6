# shellcheck shell=bash
# Keys on a KMIP server (PyKMIP) and in Barbican (with Keystone), as the installed package asks for them: from inside the
# sandbox of its unit, over a network, with TLS. LUNs of prot-kmip and prot-barbican: 0 and 1 are enrolled. Domain `vm`
# uses them; `other` has nothing protected.
# machines: one
# machine: second
# takes: 560
# always: yes
# shellcheck disable=SC2154 # Variables of guest/lib.sh.

case_the_servers_are_reached() {
    servers_reached
}

case_kmip_a_guest_starts_and_a_disk_is_attached() {
    guest_has_keys_on kmip
}

case_kmip_the_keys_are_the_same_after_a_restart() {
    first keys_stay kmip
}

case_kmip_a_stopped_server() {
    stopped_server kmip kmip 'no KMIP server could be asked for the key of volume prot-kmip-1'
}

case_kmip_a_hung_server() {
    hung_server kmip kmip
}

case_kmip_a_revoked_and_a_destroyed_key() {
    servers revoke prot-kmip-1
    first refused kmip 1 'Key has been revoked' 'the key of volume prot-kmip-1'
    # PyKMIP says of a destroyed key what it says of one that never was.
    servers destroy kmip prot-kmip-1
    first refused kmip 1 'Required key not available' 'prot-kmip-1'
    first start_refused kmip 1
    first opens kmip 0
}

case_barbican_a_guest_starts_and_a_disk_is_attached() {
    guest_has_keys_on barbican
}

case_barbican_the_keys_are_the_same_after_a_restart() {
    first keys_stay barbican
}

case_barbican_a_stopped_server() {
    stopped_server barbican barbican 'the key of volume prot-barbican-1 could not be asked for'
}

case_barbican_a_stopped_keystone() {
    stopped_server barbican keystone 'the key of volume prot-barbican-1 could not be asked for'
}

case_barbican_a_hung_server() {
    hung_server barbican barbican
}

case_barbican_a_destroyed_key() {
    servers destroy barbican prot-barbican-1
    first refused barbican 1 'Required key not available' 'prot-barbican-1'
    first start_refused barbican 1
    first opens barbican 0
}

# As after a power cut: the server is away, and the host does not know yet that it was there.
case_a_host_that_keeps_keys_starts_its_guests_without_the_server() {
    first keys_on "$(servers config kmip)"
    first has_volume_that_was_used_without_a_cache
    first keys_on "$(servers config kmip)
[key_cache]
lifetime_days = 7"
    first uses_a_volume_with_the_cache
    servers stop kmip
    "$here/lab" reboot
    "$here/lab" network
    first starts_what_it_has_kept
    servers start kmip
    first opens_all_again
}

# --- On the host ------------------------------------------------------------------------------------------

guest_has_keys_on() {
    first keys_on "$(servers config "$1")"
    first guest_works_with "$1"
}

# stopped_server MANAGER SERVER SENTENCE
stopped_server() {
    # What was had from Keystone lasts for an hour.
    first systemctl restart volcryptd
    servers stop "$2"
    first refused "$1" 1 'Connection timed out' "$3"
    first start_refused "$1" 1
    servers start "$2"
    first opens "$1" 1
}

# hung_server MANAGER SERVER
hung_server() {
    servers hang "$2"
    first others_do_not_wait "$1"
    servers start "$2"
    first opens "$1" 1
}

# --- In the machine ---------------------------------------------------------------------------------------

other_starts() {
    target_create plain 16
    target_login plain
    domain_define other
    domain_start other
}

keys_here() {
    sqlite3 -readonly /var/lib/volcrypt/volcrypt.db 'SELECT count(*) FROM keys' 2>&1
}

# guest_works_with MANAGER: a domain starts with LUN 0, and LUN 1 is attached to it.
guest_works_with() {
    local keys
    # Files before this one have left some.
    keys=$(keys_here)
    if [ -e /etc/libvirt/qemu/vm.xml ]; then
        domain_destroy vm || true
        domain_undefine vm
    fi
    volume_create "$1" 16 2
    domain_define vm <(disk_xml "$(lun_path "prot-$1" 0)" sda)
    domain_start vm
    disk_attach vm "$(lun_path "prot-$1" 1)" sdb
    expect_eq "$(mappings | sort)" "$(printf "volcrypt-prot-$1-%s\n" 0 1)" mappings
    qemu_io vm sda 'write -P 0xa0 0 64k'
    qemu_io vm sdb 'write -P 0xa1 0 64k'
    qemu_io vm sda flush
    qemu_io vm sdb flush
    expect_ciphertext "$1" 0 a0
    expect_ciphertext "$1" 1 a1
    # The keys are there and nowhere here.
    expect_eq "$(keys_here)" "$keys" 'keys in the database'
    domain_destroy vm
    nothing_left
}

# keys_stay MANAGER: a daemon that knows nothing yet gets the same keys.
keys_stay() {
    systemctl restart volcryptd
    domain_start vm
    qemu_io vm sda 'read -P 0xa0 0 64k'
    opens "$1" 1
}

# opens MANAGER LUN: the running domain has the LUN with what was written to it, and gives it back. LUN 0 is in use.
opens() {
    if [ "$2" -eq 0 ]; then
        qemu_io vm sda 'read -P 0xa0 0 64k'
        return
    fi
    disk_attach vm "$(lun_path "prot-$1" "$2")" sdb
    qemu_io vm sdb "read -P 0xa$2 0 64k"
    disk_detach vm sdb
    wait_until 20 not_mapped "prot-$1-$2"
}

not_mapped() {
    [[ $(mappings) != *volcrypt-$1* ]]
}

# refused MANAGER LUN ERRNO SENTENCE: an attach is, in time, and the journal says why.
refused() {
    local since took=$SECONDS
    since=$(date +@%s.%6N)
    expect_fails disk_attach vm "$(lun_path "prot-$1" "$2")" sdb
    took=$((SECONDS - took))
    expect_contains "$OUTPUT" "$3" 'what virsh shows'
    expect_contains "$(journal_since "$since")" "$4" 'the journal'
    journal_since "$since" | grep -F "$4" | head -n 1
    # The key manager's deadline, of which a server that is not there takes nothing, and an emulated machine's attach.
    [ "$took" -le 90 ] || fail "it took $took seconds"
    not_mapped "prot-$1-$2"
    expect_eq "$(virsh --quiet domstate vm)" running 'domain vm'
}

# start_refused MANAGER LUN: a domain with it does not start, and virsh shows the sentence.
start_refused() {
    domain_define late <(disk_xml "$(lun_path "prot-$1" "$2")" sda)
    expect_fails domain_start late
    expect_contains "$OUTPUT" "volcrypt: disk sda: "
    echo "$OUTPUT" | grep -F volcrypt:
    domain_undefine late
    not_mapped "prot-$1-$2"
}

# others_do_not_wait MANAGER: while an attach waits for a server that says nothing, another domain gets an unprotected disk.
others_do_not_wait() {
    local said waiting code waited try
    said=$(mktemp)
    [ "$(virsh --quiet domstate other 2>/dev/null)" = running ] || other_starts
    # On a busy host the other's attach takes longer than the key manager's deadline now and then, but not each time.
    for try in 1 2 3 4 5; do
        disk_attach vm "$(lun_path "prot-$1" 1)" sdb >"$said" 2>&1 &
        waiting=$! code=0 waited=
        sleep 1
        disk_attach other "$(lun_path plain)" sdb
        ! kill -0 "$waiting" 2>/dev/null || waited=yes
        disk_detach other sdb
        wait "$waiting" || code=$?
        [ "$code" -ne 0 ] || fail 'the attach succeeded'
        expect_contains "$(cat "$said")" 'Connection timed out' 'what virsh shows'
        not_mapped "prot-$1-1"
        [ -z "$waited" ] || return 0
        echo "the attach did not wait, try $try: $(cat "$said")"
    done
    fail 'the attach never waited'
}

has_volume_that_was_used_without_a_cache() {
    domain_destroy vm
    domain_define kept <(disk_xml "$(lun_path prot-kmip 0)" sda)
    volume_create cold 16
    domain_define cold <(disk_xml "$(lun_path prot-cold)" sda)
}

uses_a_volume_with_the_cache() {
    expect_contains "$(volcrypt status)" ' would start without the key server'
    domain_start kept
    qemu_io kept sda 'read -P 0xa0 0 64k'
    domain_destroy kept
    expect_contains "$(volcrypt status)" 'prot-kmip-0'
    # It is in no backup, and not in clear in the database.
    volcrypt key backup /root/cached.db >/dev/null
    expect_eq "$(sqlite3 -readonly /root/cached.db 'SELECT count(*) FROM key_cache')" 0 'kept keys in a backup'
    expect_eq "$(sqlite3 -readonly /var/lib/volcrypt/volcrypt.db 'SELECT volume_id FROM key_cache')" prot-kmip-0 'kept keys'
    rm /root/cached.db
}

starts_what_it_has_kept() {
    local since took
    target_restore prot-kmip
    target_restore prot-cold
    target_login prot-kmip
    target_login prot-cold
    since=$(date +@%s.%6N)
    domain_start kept
    qemu_io kept sda 'read -P 0xa0 0 64k'
    expect_contains "$(journal_since "$since")" "comes from this host's cache, because no key server answers" 'the journal'
    volcrypt audit show --volume prot-kmip-0 --kind key-used --limit 1 | grep -q 'cache' ||
        fail "the audit log does not say where the key came from: $(volcrypt audit show --volume prot-kmip-0 --limit 1)"
    took=$SECONDS
    expect_fails domain_start cold
    expect_contains "$OUTPUT" 'volcrypt: disk sda: '
    [ $((SECONDS - took)) -le 90 ] || fail "the refusal took $((SECONDS - took)) seconds"
    not_mapped prot-cold-0
}

opens_all_again() {
    domain_start cold
    domain_destroy cold
    domain_destroy kept
    nothing_left
}
