# shellcheck shell=bash
# Live migration between two hypervisors, of which the first also is the storage server. A guest writes and verifies its
# protected disk all the time; see guest/two.sh.
# machines: two
# limit: 3000
# takes: 2600

# shellcheck disable=SC2034,SC2154 # The helpers read them, or set them.
lab_portal=192.168.77.1:3260
volume=prot-move-0
key=/root/move.key

case_two_hypervisors_see_one_volume() {
    first host_join 1
    second host_join 2
    first protect
    # What would give a volume that looks blank a second key.
    second protect 'create_keys = true'
    first volume_create move 16
    second target_join prot-move
    first install_guest
    first guest_start none
    second nothing_here
}

case_a_host_without_the_key_is_refused() {
    refused "host hv2: disk sda: volume $volume on /dev/sda has no key on this host"
    [[ $(second volcrypt volume list) != *"$volume"* ]] || fail 'it was enrolled anew at the destination'
    second volcrypt audit verify >/dev/null
}

case_a_host_without_the_rule_is_refused() {
    second rules_away
    refused 'host hv2: disk sda: /dev/sda holds what looks like ciphertext, and no rule here says'
    second rules_back
}

# The way of the README.
case_the_keys_are_copied() {
    second keys_take "$(first keys_show)"
    expect_eq "$(second enrolled)" "$(first enrolled)" 'what is enrolled'
}

case_a_host_without_the_lun_is_refused() {
    second target_logout prot-move
    refused "host hv2: disk sda: $(lun_path prot-move) does not exist: log in to its target first"
    second target_join prot-move
}

case_a_host_on_which_it_is_anothers_is_refused() {
    second volcrypt volume set-owner "$volume" p2 >/dev/null
    refused "host hv2: disk sda: volume $volume belongs to \"p2\" and domain vm to nobody"
    second volcrypt volume set-owner "$volume" >/dev/null
    second volcrypt volume retire "$volume" >/dev/null
    refused "host hv2: disk sda: volume $volume is retired"
    second volcrypt volume enrol "$(lun_path prot-move)" >/dev/null
}

case_a_host_whose_daemon_is_down_is_refused() {
    second systemctl stop volcryptd.socket volcryptd-control.socket volcryptd
    refused 'host hv2: volcryptd cannot be reached'
    second systemctl start volcryptd.socket volcryptd-control.socket volcryptd
}

case_there_and_back_ten_times() {
    local turn
    for ((turn = 1; turn <= 10; turn++)); do
        first qemu_io vm sda "write -P 0xa$((turn % 10)) 1M 64k"
        first migrate_to hv2
        first nothing_left
        second is_here
        second qemu_io vm sda "read -P 0xa$((turn % 10)) 1M 64k"
        second qemu_io vm sda "write -P 0xb$((turn % 10)) 2M 64k"
        second migrate_to hv1
        second nothing_here
        first is_here
        first qemu_io vm sda "read -P 0xb$((turn % 10)) 2M 64k"
    done
    first expect_ciphertext move 0 a0
    first expect_ciphertext move 0 b0
}

# What Nova does: each host has its own path for the volume, and the XML that goes with the migration says the other's.
case_the_path_is_another_on_the_other_host() {
    first migrate_with_path hv2 "$(second lun_device prot-move)"
    second is_here
    second migrate_with_path hv1 "$(lun_path prot-move)"
    second nothing_here
    first is_here
}

# A host that points disks to mappings in the XML sends what such a host has, and the hook here takes it back.
case_a_guest_comes_from_a_host_that_names_mappings() {
    first migrate_as_mapped hv2
    second is_here
    expect_contains "$(second virsh dumpxml vm)" "<source dev='$(lun_path prot-move)'" 'disk'
    expect_contains "$(second virsh dumpxml vm)" '<emulator>/usr/libexec/volcrypt/emulators/' 'emulator'
    second migrate_to hv1
    second nothing_here
    expect_fails first migrate_with_path hv2 "/dev/mapper/volcrypt-$volume"
    expect_contains "$OUTPUT" "volcrypt: host hv2: disk sda: it is on /dev/mapper/volcrypt-$volume, and no note"
    stays
}

# The XML that goes with the guest names the emulator of a host without the wrapper.
case_between_hosts_with_and_without_the_wrapper() {
    second intercept xml
    first migrate_without_wrapper hv2
    first nothing_left
    second is_here
    expect_contains "$(second virsh dumpxml vm)" "<source dev='/dev/mapper/volcrypt-$volume'" 'disk'
    expect_contains "$(second virsh dumpxml vm)" '<emulator>/usr/bin/' 'emulator'
    second migrate_to hv1
    second nothing_here
    first is_here
    expect_contains "$(first virsh dumpxml vm)" "<source dev='$(lun_path prot-move)'" 'disk'
    expect_contains "$(first virsh dumpxml vm)" '<emulator>/usr/libexec/volcrypt/emulators/' 'emulator'
    second volcrypt volume retire "$volume" >/dev/null
    refused "host hv2: disk sda: volume $volume is retired"
    second volcrypt volume enrol "$(lun_path prot-move)" >/dev/null
}

case_between_hosts_without_the_wrapper() {
    local turn
    first intercept xml
    first migrate_without_wrapper hv2
    for ((turn = 1; turn <= 3; turn++)); do
        second is_here
        second migrate_to hv1
        second nothing_here
        first is_here
        first migrate_to hv2
        first nothing_left
    done
    second is_here
    first intercept open
    second intercept open
    second migrate_to hv1
    first is_here
    expect_contains "$(first virsh dumpxml vm)" "<source dev='$(lun_path prot-move)'" 'disk'
}

case_a_qemu_that_dies_at_the_destination_leaves_the_guest_at_its_source() {
    first slow_network
    first migrate_in_background
    first memory_is_copied
    second kill_guest
    first migration_has_failed
    first fast_network
    stays
}

case_a_network_that_breaks_leaves_the_guest_at_its_source() {
    first slow_network
    first migrate_in_background --p2p
    first memory_is_copied
    second ip link set eth0 down
    first migration_has_failed
    first fast_network
    second ip link set eth0 up
    stays
}

# Through the page cache of the mapping, which the destination fills before the guest is there.
case_there_and_back_with_a_page_cache() {
    first domain_destroy vm
    first domain_undefine vm
    first guest_start writeback
    first migrate_to hv2
    second is_here
    second migrate_to hv1
    first is_here
}

case_the_data_is_right_at_the_end() {
    first domain_destroy vm
    first nothing_left
    second nothing_here
    first check_disk
    first expect_ciphertext move 0 a0
}

# --- In the machines --------------------------------------------------------------------------------------

# install_guest: puts the guest onto the volume as anybody could who has its key.
install_guest() {
    volcrypt volume export-key "$volume" --to "$key"
    in_clear guest_install
}

check_disk() {
    in_clear guest_disk_is_right
}

# in_clear COMMAND: runs it with the path of a mapping of the volume that is none of volcrypt's.
in_clear() {
    cryptsetup open --type plain --cipher aes-xts-plain64 --key-size 512 --key-file "$key" --keyfile-size 64 \
        "$(lun_device prot-move)" clear
    "$1" /dev/mapper/clear
    wait_until 30 cryptsetup close clear
}

# guest_start CACHE
guest_start() {
    domain_define vm <(disk_xml "$(lun_path prot-move)" sda | sed "s/cache='none' io='native'/cache='$1'/")
    domain_start vm
    wait_until 120 guest_past vm 3
}

# enrolled: the records of the volumes.
enrolled() {
    volcrypt volume list --json | jq 'map(del(.mapped, .domains))'
}

migrate_with_path() {
    virsh dumpxml --migratable vm | sed "s|<source dev='[^']*'|<source dev='$2'|" >/root/vm.xml
    migrate_to "$1" --xml /root/vm.xml
}

migrate_as_mapped() {
    virsh dumpxml --migratable vm | volcrypt rewrite >/root/vm.xml
    grep -q "<source dev=./dev/mapper/volcrypt-$volume." /root/vm.xml
    sed -i 's|<emulator>[^<]*/|<emulator>/usr/bin/|' /root/vm.xml
    migrate_to "$1" --xml /root/vm.xml
}

migrate_without_wrapper() {
    virsh dumpxml --migratable vm | sed 's|<emulator>[^<]*/|<emulator>/usr/bin/|' >/root/vm.xml
    migrate_to "$1" --xml /root/vm.xml
}

# intercept MODE
intercept() {
    sed -i '/^\[hook\]$/,$d' "$volcrypt_config"
    printf '%s\n' '[hook]' "intercept = \"$1\"" >>"$volcrypt_config"
    reload
}

rules_away() {
    cp "$volcrypt_config" /root/rules.toml
    sed -i '/^\[\[rules\]\]$/,$d' "$volcrypt_config"
    reload
}

rules_back() {
    cp /root/rules.toml "$volcrypt_config"
    reload
}

# is_here: the guest works here, on the one mapping there is.
is_here() {
    expect_eq "$(mappings)" "volcrypt-$volume" mappings
    expect_eq "$(virsh domstate vm)" running 'state'
    guest_works vm
}

# slow_network: memory takes half a minute from here on.
slow_network() {
    tc qdisc replace dev eth0 root tbf rate 400kbit burst 16kb latency 200ms
}

fast_network() {
    tc qdisc del dev eth0 root
}

migrate_in_background() {
    rm -f /root/migration
    (
        code=0
        migrate_to hv2 "$@" >/root/migration.output 2>&1 || code=$?
        echo "$code" >/root/migration
    ) </dev/null >/dev/null 2>&1 &
}

memory_is_copied() {
    wait_until 120 memory_moves
}

memory_moves() {
    [ ! -e /root/migration ] && virsh domjobinfo vm | grep -q '^Memory processed: *[1-9]'
}

migration_has_failed() {
    wait_until 200 test -e /root/migration
    [ "$(cat /root/migration)" -ne 0 ] || fail 'the migration succeeded'
    cat /root/migration.output
}

kill_guest() {
    kill -KILL "$(domain_pid vm)"
}

# --- On the host ------------------------------------------------------------------------------------------

# refused SENTENCE: a migration to the second host is, with that sentence, and nothing comes of it.
refused() {
    expect_fails first migrate_to hv2
    expect_contains "$OUTPUT" "volcrypt: $1"
    stays
}

# stays: the guest works at the first host, with its disk, and nothing of it is at the second one.
stays() {
    first is_here
    first qemu_io vm sda 'write -P 0xcd 3M 64k'
    first qemu_io vm sda 'read -P 0xcd 3M 64k'
    second nothing_here
}
