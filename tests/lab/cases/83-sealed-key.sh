# shellcheck shell=bash
# The key-encryption key as a credential that systemd has sealed to the machine's TPM (swtpm, one for each machine) or to
# the host's key, in the way of the README.
# machines: two
# takes: 250

sealed=/etc/volcrypt/volcrypt.kek
drop_in=/etc/systemd/system/volcryptd.service.d/kek.conf

case_sealed_to_the_tpm() {
    first opens_with_a_key_sealed_by tpm2
}

case_sealed_to_another_tpm() {
    local sealed_to_first
    sealed_to_first=$(first base64 --wrap 0 "$sealed")
    second another_machines_credential "$sealed_to_first"
}

case_sealed_to_the_host_key() {
    first opens_with_a_key_sealed_by host
}

case_without_the_credential() {
    first without_the_credential
}

# opens_with_a_key_sealed_by KEY: a host that is set up in the order of the README, on which nothing is enrolled yet.
opens_with_a_key_sealed_by() {
    stop_daemon
    rm -rf /var/lib/volcrypt/* "$drop_in"
    systemctl daemon-reload
    start_daemon
    volcrypt status >/dev/null
    [ -e /var/lib/volcrypt/kek ] || fail 'whoever asks for the status has no key-encryption key made any more'
    head -c 32 /dev/urandom | systemd-creds encrypt --with-key="$1" --name=volcrypt.kek - "$sealed"
    use_credential
    protect
    volume_create "$1" 16
    # It wraps nothing.
    rm /var/lib/volcrypt/kek
    define_and_start "$1"
    qemu_io "$1" sda 'write -P 0x7e 0 64k'
    qemu_io "$1" sda flush
    expect_ciphertext "$1" 0 7e
    # The daemon is given it anew.
    domain_destroy "$1"
    systemctl restart volcryptd
    domain_start "$1"
    qemu_io "$1" sda 'read -P 0x7e 0 64k'
    domain_destroy "$1"
    nothing_left
}

# another_machines_credential TEXT
another_machines_credential() {
    local since
    since=$(date +@%s)
    stop_daemon
    mkdir -p "$(dirname "$sealed")"
    base64 --decode <<<"$1" >"$sealed"
    use_credential
    systemctl start volcryptd || true
    domain_define other
    # systemd starts no daemon without what it was told to hand over, and the hook waits for one until its deadline.
    expect_fails domain_start other
    expect_contains "$OUTPUT" volcryptd
    expect_contains "$(journal_since "$since")" 'Failed to set up credentials' 'the journal'
    rm "$drop_in" "$sealed"
    systemctl daemon-reload
    start_daemon
    domain_start other
}

without_the_credential() {
    # What is asked for and is not there.
    rm "$sealed"
    systemctl restart volcryptd || true
    expect_fails domain_start host
    # What is not even asked for.
    rm "$drop_in"
    systemctl daemon-reload
    start_daemon
    expect_fails domain_start host
    expect_contains "$OUTPUT" 'the key-encryption key is missing'
}

define_and_start() {
    domain_define "$1" <(disk_xml "$(lun_path "prot-$1")" sda)
    domain_start "$1"
}

use_credential() {
    mkdir -p "$(dirname "$drop_in")"
    printf '[Service]\nLoadCredentialEncrypted=volcrypt.kek:%s\n' "$sealed" >"$drop_in"
    systemctl daemon-reload
}
