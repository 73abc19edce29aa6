# shellcheck shell=bash
# Keys that Cinder has made in Barbican: volumes that os-brick has encrypted with them are adopted as they are, and new
# ones get them for keys. LUNs of prot-cinder: 0 and 1 are encrypted as os-brick does it, 2 is blank. Domain `vm` uses
# them.
# machines: one
# takes: 300
# shellcheck disable=SC2154 # Variables of guest/lib.sh.

case_the_servers_are_reached() {
    servers_reached
    first cinder_has_keys_on "$(servers config barbican)"
    first target_create prot-cinder 24 3
    first target_login prot-cinder
}

case_a_volume_of_os_brick_is_adopted() {
    local secret other
    secret=$(servers order 256)
    other=$(servers order 256)
    first encrypted_as_os_brick_does 0 "$(servers digits "$secret")"
    first nothing_else_is_taken_for_it 0 "$secret" "$other"
    first adopted 0 "$secret" sha256
    first is_used_by_a_guest 0
    # It is what os-brick would find.
    first os_brick_reads 0 "$(servers digits "$secret")" 0xb0
}

# What cryptsetup made of the passphrase before version 2.7.
case_a_volume_of_an_older_os_brick_is_adopted() {
    local secret
    secret=$(servers order 256)
    first encrypted_as_os_brick_does 1 "$(servers digits "$secret")" --hash ripemd160
    first adopted 1 "$secret" ripemd160 --passphrase-hash ripemd160
    first is_used_by_a_guest 1
    first os_brick_reads 1 "$(servers digits "$secret")" 0xb1 --hash ripemd160
}

case_a_new_volume_gets_a_secret_of_cinders() {
    local secret
    secret=$(servers order 256)
    first has_the_secret_for_its_key 2 "$secret"
    servers delete "$secret"
    first has_no_key_any_more 2 "$secret"
}

# --- In the machine ---------------------------------------------------------------------------------------

# cinder_has_keys_on CONFIGURATION: with a profile as the volume type in Cinder: 256 bits, which Barbican's own crypto
# plugin makes without being told a mode.
cinder_has_keys_on() {
    protect 'profile = "cinder"'
    printf '%s\n[profiles.cinder]\ncipher = "aes-xts-plain64"\nkey_size = 256\n' "$1" >>"$volcrypt_config"
    systemctl restart volcryptd
}

# os_brick DIGITS DEVICE NAME [OPTION...]: maps the device as os-brick does.
os_brick() {
    printf %s "$1" | cryptsetup create --key-file=- --cipher aes-xts-plain64 --key-size 256 "${@:4}" "$3" "$2"
}

# encrypted_as_os_brick_does LUN DIGITS [OPTION...]: with swap space on it, and 64 KiB of 0xaLUN at 16 MiB.
encrypted_as_os_brick_does() {
    os_brick "$2" "$(lun_device prot-cinder "$1")" os-brick "${@:3}"
    mkswap --quiet /dev/mapper/os-brick
    head -c 65536 /dev/zero | tr '\0' "\\24$1" | dd of=/dev/mapper/os-brick bs=64k seek=256 conv=fsync status=none
    wait_until 30 cryptsetup close os-brick
}

# os_brick_reads LUN DIGITS BYTE [OPTION...]: what the guest wrote, beside the swap space.
os_brick_reads() {
    os_brick "$2" "$(lun_device prot-cinder "$1")" os-brick "${@:4}"
    expect_eq "$(blkid --probe --output value --match-tag TYPE /dev/mapper/os-brick)" swap 'what os-brick sees'
    expect_eq "$(dd if=/dev/mapper/os-brick bs=64k skip=257 count=1 iflag=direct status=none | tr -d "\\26$1" | wc -c)" 0 \
        "bytes that are not $3"
    wait_until 30 cryptsetup close os-brick
}

# What stands on the LUN.
sum() {
    sync
    sha256sum <"$(lun_backing prot-cinder "$1")"
}

not_adopted() {
    expect_fails volcrypt volume show "prot-cinder-$1"
    nothing_left
}

# nothing_else_is_taken_for_it LUN SECRET OTHER
nothing_else_is_taken_for_it() {
    local device before
    device=$(lun_device prot-cinder "$1")
    before=$(sum "$1")
    expect_fails volcrypt volume enrol "$device" --secret "$2"
    expect_contains "$OUTPUT" "'volcrypt volume adopt"
    expect_fails volcrypt volume adopt "$device" --secret "$2" --passphrase-hash ripemd160
    expect_contains "$OUTPUT" 'nothing is recognised' 'a wrong hash'
    echo "$OUTPUT"
    expect_fails volcrypt volume adopt "$device" --secret "$3"
    expect_contains "$OUTPUT" 'nothing is recognised' 'a wrong secret'
    expect_fails volcrypt volume adopt "$device" --secret 00000000-0000-0000-0000-000000000001
    expect_contains "$OUTPUT" 'Barbican has no secret' 'no secret'
    expect_fails volcrypt volume adopt "$(lun_device prot-cinder 2)" --secret "$2"
    expect_contains "$OUTPUT" 'is blank'
    expect_eq "$(sum "$1")" "$before" 'the LUN'
    not_adopted "$1"
    # While os-brick has it open it is not taken either.
    printf '0 2048 linear %s 0\n' "$device" | dmsetup create held
    expect_fails volcrypt volume adopt "$device" --secret "$2"
    expect_contains "$OUTPUT" 'in use by the host itself'
    dmsetup remove --retry held
    not_adopted "$1"
}

# adopted LUN SECRET HASH [OPTION...]
adopted() {
    local device before shown
    device=$(lun_device prot-cinder "$1")
    before=$(sum "$1")
    shown=$(volcrypt volume adopt "$device" --secret "$2" "${@:4}")
    expect_eq "$(sum "$1")" "$before" 'the LUN'
    nothing_left
    expect_contains "$shown" "$2"
    expect_contains "$shown" "($3)"
    # Once more changes nothing; the secret is no other volume's.
    expect_eq "$(volcrypt volume adopt "$device" --secret "$2")" "$shown" 'what is shown'
    expect_fails volcrypt volume enrol "$(lun_device prot-cinder 2)" --secret "$2"
    expect_contains "$OUTPUT" "is the key of volume prot-cinder-$1"
    expect_fails volcrypt volume destroy "prot-cinder-$1" --confirm "prot-cinder-$1"
    expect_contains "$OUTPUT" 'which Cinder has made'
}

# is_used_by_a_guest LUN
is_used_by_a_guest() {
    if [ -e /etc/libvirt/qemu/vm.xml ]; then
        domain_destroy vm || true
        domain_undefine vm
    fi
    domain_define vm
    domain_start vm
    disk_attach vm "$(lun_path prot-cinder "$1")" sdb
    expect_mapped "prot-cinder-$1"
    qemu_io vm sdb "read -P 0xa$1 16M 64k"
    qemu_io vm sdb "write -P 0xb$1 16448k 64k"
    qemu_io vm sdb flush
    expect_ciphertext cinder "$1" "b$1"
    disk_detach vm sdb
    wait_until 20 no_mapping
    # After a restart the record names the key.
    systemctl restart volcryptd
    disk_attach vm "$(lun_path prot-cinder "$1")" sdb
    qemu_io vm sdb "read -P 0xb$1 16448k 64k"
    disk_detach vm sdb
    domain_destroy vm
    nothing_left
}

# has_the_secret_for_its_key LUN SECRET
has_the_secret_for_its_key() {
    expect_contains "$(volcrypt volume enrol "$(lun_device prot-cinder "$1")" --secret "$2")" "$2"
    is_used_by_a_guest_first_time "$1"
}

is_used_by_a_guest_first_time() {
    domain_start vm
    disk_attach vm "$(lun_path prot-cinder "$1")" sdb
    qemu_io vm sdb "write -P 0xa$1 0 64k"
    qemu_io vm sdb flush
    expect_ciphertext cinder "$1" "a$1"
    disk_detach vm sdb
    wait_until 20 no_mapping
}

# has_no_key_any_more LUN SECRET
has_no_key_any_more() {
    local since
    since=$(date +@%s.%6N)
    expect_fails disk_attach vm "$(lun_path prot-cinder "$1")" sdb
    expect_contains "$OUTPUT" 'Required key not available' 'what virsh shows'
    expect_contains "$(journal_since "$since")" "Barbican has no secret $2" 'the journal'
    domain_destroy vm
    nothing_left
}
