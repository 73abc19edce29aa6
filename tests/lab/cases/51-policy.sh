# shellcheck shell=bash
# shellcheck disable=SC2154 # The helpers that are sourced first assign what is not assigned here.
# Whose volume it is, and what may still be done with it.
# LUNs of prot-own: 0 belongs to project p1; 1 is blank; 2 belongs to nobody; 3 is destroyed in the end.
# machine: second
# takes: 400
# always: yes

wrapper=/usr/libexec/volcrypt/emulators/qemu-system-x86_64

# domain_of PROJECT NAME: a running domain that Nova made for a project.
domain_of() {
    domain_define "$2"
    virsh dumpxml --inactive "$2" | awk -v project="$1" '
        { print }
        /<name>/ {
            print "<metadata><nova:instance xmlns:nova=\"http://openstack.org/xmlns/libvirt/nova/1.1\"><nova:owner>"
            print "<nova:user uuid=\"u\">admin</nova:user><nova:project uuid=\"" project "\">demo</nova:project>"
            print "</nova:owner></nova:instance></metadata>"
        }' | virsh --quiet define /dev/stdin >/dev/null
    domain_start "$2"
}

# refused DOMAIN LUN ERRNO_TEXT SENTENCE: attaching the LUN fails so, and the journal says why.
refused() {
    local since
    since=$(date +%s)
    expect_fails disk_attach "$1" "$(lun_path prot-own "$2")" sdb
    expect_contains "$OUTPUT" "$3" "attaching LUN $2 to $1"
    said_since "$since" "$4" || fail "the journal does not say '$4': $(journal_since "@$since")"
    no_mapping || fail 'a mapping was made'
}

# attaches DOMAIN LUN: and detaches again.
attaches() {
    disk_attach "$1" "$(lun_path prot-own "$2")" sdb
    expect_mapped "prot-own-$2"
    disk_detach "$1" sdb
    nothing_left
}

case_a_volume_is_for_the_domains_of_its_owner() {
    protect
    volume_create own 8 4
    volcrypt volume set-owner prot-own-0 p1 >/dev/null
    domain_of p1 one
    domain_of p2 two
    domain_define bare
    domain_start bare
    attaches one 0
    refused two 0 'Permission denied' 'volume prot-own-0 belongs to "p1" and domain two to "p2"'
    refused bare 0 'Permission denied' 'domain bare to nobody'
    attaches two 2
    attaches bare 2
}

# An owner in volcrypt's own metadata, for those who have no Nova, while the domain runs.
case_an_owner_without_nova() {
    virsh --quiet metadata bare --uri https://volcrypt.org/xmlns/libvirt/owner/1 --key volcrypt --live --config \
        --set '<owner>p1</owner>' >/dev/null
    attaches bare 0
    virsh --quiet metadata bare --uri https://volcrypt.org/xmlns/libvirt/owner/1 --live --config --remove >/dev/null
    refused bare 0 'Permission denied' 'domain bare to nobody'
}

case_a_start_is_refused_with_the_same_sentence() {
    domain_define late <(disk_xml "$(lun_path prot-own 0)" sda)
    expect_fails domain_start late
    expect_contains "$OUTPUT" 'volume prot-own-0 belongs to "p1" and domain late to nobody' 'virsh start'
    expect_contains "$OUTPUT" 'volcrypt grant add prot-own-0 late --for 1h' 'virsh start'
    volcrypt grant add prot-own-0 late --for 1h
    domain_start late
    expect_mapped prot-own-0
    domain_destroy late
    nothing_left
}

case_a_grant_ends() {
    volcrypt grant add prot-own-0 "$(virsh domuuid two | tr -d '\n')" --for 1h
    attaches two 0
    expect_contains "$(volcrypt grant list)" prot-own-0
    volcrypt grant revoke prot-own-0 "$(virsh domuuid two | tr -d '\n')"
    refused two 0 'Permission denied' 'belongs to "p1"'
    volcrypt grant add prot-own-0 two --for 1s
    sleep 2
    refused two 0 'Permission denied' 'belongs to "p1"'
}

# attach_shared NAME PATH TARGET_DEV: as disk_attach, for domains that share it.
attach_shared() {
    disk_xml "$2" "$3" | sed 's,</disk>,<shareable/></disk>,' | virsh --quiet attach-device "$1" /dev/stdin --live
}

# The mapping that one domain has is the volume under another name: for who may have the volume.
case_a_mapping_is_for_those_who_may_have_its_volume() {
    local since mapping=/dev/mapper/volcrypt-prot-own-0
    disk_attach one "$(lun_path prot-own 0)" sdb
    qemu_io one sdb 'write -P 0xcd 0 64k' >/dev/null
    wait_until 30 test -b "$mapping"
    since=$(date +%s)
    expect_fails disk_attach two "$mapping" sdb
    expect_contains "$OUTPUT" 'Permission denied' 'attaching the mapping to two'
    said_since "$since" 'volume prot-own-0 belongs to "p1" and domain two to "p2"' ||
        fail "the journal: $(journal_since "@$since")"
    domain_define namer <(disk_xml "$mapping" sda)
    expect_fails domain_start namer
    expect_contains "$OUTPUT" 'volume prot-own-0 belongs to "p1" and domain namer to nobody' 'virsh start'
    domain_undefine namer
    volcrypt grant add prot-own-0 two --for 1h
    # By this name as well it is the volume that one writes to alone.
    expect_fails disk_attach two "$mapping" sdb
    expect_contains "$OUTPUT" lock 'attaching the mapping to two'
    disk_detach one sdb
    nothing_left
    attach_shared one "$(lun_path prot-own 0)" sdb
    wait_until 30 test -b "$mapping"
    attach_shared two "$mapping" sdb
    qemu_io two sdb 'read -P 0xcd 0 64k' >/dev/null
    volcrypt audit show --volume prot-own-0 --kind key-used --json |
        jq --exit-status 'any(.[]; .domain == "two" and (.detail | contains("volcrypt-prot-own-0")))' >/dev/null ||
        fail "the use of the mapping is not recorded: $(volcrypt audit show --volume prot-own-0 --kind key-used)"
    disk_detach two sdb
    volcrypt grant revoke prot-own-0 two
    disk_detach one sdb
    nothing_left
}

case_the_first_user_becomes_the_owner() {
    volcrypt volume destroy prot-own-1 --confirm prot-own-1
    protect 'create_keys = true'
    target_create prot-first 8
    target_login prot-first
    disk_attach one "$(lun_path prot-first)" sdb
    expect_eq "$(volcrypt volume show prot-first-0 --json | jq --raw-output .owner)" p1 owner
    disk_detach one sdb
    nothing_left
    expect_fails disk_attach two "$(lun_path prot-first)" sdb
    expect_contains "$OUTPUT" 'Permission denied'
}

case_a_retired_volume_comes_back() {
    disk_attach one "$(lun_path prot-own 0)" sdb
    qemu_io one sdb 'write -P 0xab 0 64k' >/dev/null
    expect_fails volcrypt volume retire prot-own-0
    expect_contains "$OUTPUT" 'in use on this host'
    expect_fails volcrypt volume destroy prot-own-0 --confirm prot-own-0
    expect_contains "$OUTPUT" 'in use on this host'
    disk_detach one sdb
    nothing_left
    volcrypt volume retire prot-own-0 >/dev/null
    refused one 0 'Required key not available' 'volume prot-own-0 is retired'
    volcrypt volume enrol "$(lun_path prot-own 0)" >/dev/null
    disk_attach one "$(lun_path prot-own 0)" sdb
    qemu_io one sdb 'read -P 0xab 0 64k' >/dev/null
    disk_detach one sdb
    nothing_left
}

case_a_destroyed_volume_is_gone_for_ever() {
    local before
    before=$(key_bytes prot-own-3)
    grep -qaF "$before" <(database) || fail 'the wrapped key was not found while it is there'
    expect_fails volcrypt volume destroy prot-own-3 </dev/null
    expect_contains "$OUTPUT" 'nothing was destroyed'
    echo prot-own-3 | volcrypt volume destroy prot-own-3 2>/dev/null
    ! grep -qaF "$before" <(database) || fail 'the wrapped key still stands in the database'
    refused one 3 'Key has been revoked' 'volume prot-own-3 was destroyed'
    expect_fails volcrypt volume enrol "$(lun_path prot-own 3)"
    expect_contains "$OUTPUT" 'was destroyed'
    systemctl restart volcryptd
    refused one 3 'Key has been revoked' 'volume prot-own-3 was destroyed'
}

# key_bytes VOLUME: its wrapped key, in hexadecimal.
key_bytes() {
    python3 -c 'import sqlite3, sys
print(sqlite3.connect("/var/lib/volcrypt/volcrypt.db").execute(
    "SELECT hex(wrapped) FROM keys WHERE volume_id = ?", sys.argv[1:]).fetchone()[0])' "$1"
}

# Everything the database is made of, in hexadecimal.
database() {
    cat /var/lib/volcrypt/volcrypt.db* | od -An -v -tx1 | tr -d ' \n' | tr a-f A-F
}

case_keys_leave_only_where_the_configuration_says_so() {
    sed -i '/export_keys/d' "$volcrypt_config"
    systemctl reload volcryptd
    wait_until 20 export_is_refused
    [ ! -e /root/refused.key ] || fail 'a file was made for a key'
}

export_is_refused() {
    ! volcrypt volume export-key prot-own-0 --to /root/refused.key 2>/run/lab-export &&
        grep -q 'export_keys = true' /run/lab-export
}

case_a_faulty_file_changes_nothing() {
    local since
    since=$(date +%s)
    cp "$volcrypt_config" /run/lab-config
    echo 'rules = "none"' >>"$volcrypt_config"
    systemctl reload volcryptd
    wait_until 20 said_since "$since" 'the earlier configuration stays in force'
    expect_contains "$(volcrypt status)" 'the earlier configuration is in force' status
    attaches one 0
    cp /run/lab-config "$volcrypt_config"
    systemctl reload volcryptd
    wait_until 20 said_since "$since" "the configuration in $volcrypt_config is in force"
    ! volcrypt status | grep -q 'earlier configuration' || fail 'status still names the fault'
}

# Rules for one domain; the daemon is not restarted, and the guests run on.
case_rules_for_some_domains() {
    local since
    since=$(date +%s)
    {
        printf '%s\n' '[policy]' 'unmatched_iscsi = "deny"' '[[rules]]' 'name = "no-two"' 'action = "deny"' \
            "iscsi_target = '.*:prot-.*'" "domain = 'two'"
        sed '/^\[policy\]/d' /run/lab-config
    } >"$volcrypt_config"
    volcrypt config check >/dev/null
    expect_contains "$(volcrypt policy test --device "$(lun_path prot-own 2)" --domain two)" \
        'matches: it is denied' 'policy test'
    expect_contains "$(volcrypt policy test --device "$(lun_path prot-own 2)" --domain one)" \
        'protected as volume prot-own-2 by rule lab' 'policy test'
    systemctl reload volcryptd
    wait_until 20 said_since "$since" 'is in force'
    refused two 2 'Permission denied' 'rule "no-two" denies'
    attaches one 2
    target_create free 8
    target_login free
    expect_fails disk_attach one "$(lun_path free)" sdb
    expect_contains "$OUTPUT" 'Permission denied' 'a LUN that no rule matches'
    said_since "$since" 'no rule matches' || fail 'the journal does not say so'
}

# On a host whose /dev is QEMU's as well, nodes there are its user's own. Whoever takes such a node without
# being a domain of libvirt's gets nothing, whatever he calls himself.
case_a_forged_name_gets_nothing() {
    local since node=/dev/lab-forged
    protect
    since=$(date +%s)
    mknod "$node" b $((0x$(stat -L -c %t "$(lun_path prot-own 0)"))) $((0x$(stat -L -c %T "$(lun_path prot-own 0)")))
    chown libvirt-qemu "$node"
    chmod 600 "$node"
    expect_fails setpriv --reuid libvirt-qemu --regid kvm --clear-groups timeout 60 "$wrapper" -name guest=one \
        -uuid "$(virsh domuuid one | tr -d '\n')" -machine none -display none \
        -blockdev "driver=host_device,node-name=x,filename=$node"
    rm "$node"
    expect_contains "$OUTPUT" "Could not open '$node': Permission denied"
    said_since "$since" 'the process that asks for it is none' || fail "the journal: $(journal_since "@$since")"
    no_mapping || fail 'a mapping was made'
}

case_the_domains_end() {
    lab_reset
    nothing_left
}
