# Helpers of the cases that are about volcrypt. Sourced after lib.sh, never run.
# shellcheck shell=bash

volcrypt_config=/etc/volcrypt/volcrypt.toml

# protect [LINE...]: has every LUN of the lab's targets prot-* protected, as volume NAME-LUN, lets keys be
# exported, and restarts the daemon. Further lines go into that rule, for example 'create_keys = true'.
protect() {
    {
        printf '%s\n' '[policy]' 'export_keys = true' '[[rules]]' 'name = "lab"' "iscsi_target = 'iqn\\.2026-11\\.org\\.lab:(?<id>prot-.*)'" \
            "volume_id = \"\${id}-\${lun}\""
        [ $# -eq 0 ] || printf '%s\n' "$@"
    } >"$volcrypt_config"
    systemctl restart volcryptd
}

# volume_create NAME SIZE_MB [LUNS]: a target prot-NAME with blank LUNs, logged in to and enrolled.
volume_create() {
    local name=prot-$1 lun
    target_create "$name" "$2" "${3:-1}"
    target_login "$name"
    for ((lun = 0; lun < ${3:-1}; lun++)); do
        volcrypt volume enrol "$(lun_device "$name" "$lun")" >/dev/null
    done
}

# mappings: the names of volcrypt's mappings in the kernel, one a line.
mappings() {
    dmsetup ls 2>/dev/null | sed -n 's/^\(volcrypt-[^[:space:]]*\).*/\1/p'
}

# mapping_device VOLUME: its mapping as the kernel names it, /dev/dm-N. The link under /dev/mapper is udev's, which may
# make it seconds after the guest has got the mapping.
mapping_device() {
    echo "/dev/$(dmsetup info --columns --noheadings --options blkdevname "volcrypt-$1")"
}

# expect_mapped VOLUME: the guest works on a mapping of it.
expect_mapped() {
    expect_contains "$(mappings)" "volcrypt-$1" mappings
}

# nothing_left: no mapping, no loop device, no key in a keyring; mappings may take a moment to go.
nothing_left() {
    wait_until 20 no_mapping
    expect_eq "$(losetup --all)" '' 'loop devices'
    ! grep volcrypt: /proc/keys || fail "a key is left in a keyring"
}

no_mapping() {
    [ -z "$(mappings)" ]
}

# expect_ciphertext NAME [LUN] [BYTE]: what stands on the storage server's file has no 32 bytes in a row of
# the value (hexadecimal, ab) that the guest wrote, and is not blank.
expect_ciphertext() {
    local file byte=${3:-ab}
    file=$(lun_backing "prot-$1" "${2:-0}")
    sync
    ! LC_ALL=C grep -qaP "\\x$byte{32}" "$file" || fail "plaintext stands on $file"
    LC_ALL=C grep -qaP '[^\x00]' "$file" || fail "nothing was written to $file"
}

# keys_listed: what is known of all keys, apart from what changes with each use.
keys_listed() {
    volcrypt key list --json | jq 'map(del(.last_use, .hosts, .age_days))'
}

# journal_since TIME: what volcryptd said since then (as `date +@%s` gives it), once all that it has said is there.
journal_since() {
    journalctl --sync
    journalctl --unit volcryptd --no-pager --quiet --output cat --since "$1"
}

# said_since SECONDS TEXT: whether volcryptd has said that since then (as `date +%s` gives it).
said_since() {
    [[ $(journal_since "@$1") == *"$2"* ]]
}

# reload: has the daemon read its configuration anew, and waits until it has.
reload() {
    local since
    since=$(date +%s.%6N)
    systemctl reload volcryptd
    wait_until 90 said_since "$since" "the configuration in $volcrypt_config is in force"
}

# units_are_active: those of the daemon.
units_are_active() {
    [ "$(systemctl is-active volcryptd.service volcryptd.socket volcryptd-control.socket | sort -u)" = active ]
}

stop_daemon() {
    systemctl stop volcryptd.socket volcryptd-control.socket volcryptd
}

start_daemon() {
    systemctl start volcryptd.socket volcryptd-control.socket volcryptd
}
