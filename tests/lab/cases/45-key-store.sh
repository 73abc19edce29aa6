# shellcheck shell=bash
# The embedded key manager's database while guests use their volumes: another key-encryption key, backups, the way back.
# Domain `ks` has LUN 0 of prot-ks all the time; LUN 1 is attached to it now and then.
# machine: second
# takes: 190
# shellcheck disable=SC2154 # Variables of guest/lib.sh.

ks_folder=/var/lib/volcrypt
ks_backup=/root/ks-backup.db

case_a_backup_is_made_while_a_guest_uses_its_volume() {
    local writing
    ready
    # Of audit records and uses of keys, all the time.
    rm -f /run/lab-ks.enough
    (until [ -e /run/lab-ks.enough ]; do opens; done) >/run/lab-ks.opens 2>&1 &
    writing=$!
    volcrypt key backup "$ks_backup"
    expect_eq "$(stat -c %a "$ks_backup")" 600 'mode of the backup'
    touch /run/lab-ks.enough
    wait "$writing" || fail "the guest was disturbed: $(cat /run/lab-ks.opens)"
    # For restoring it once there is another one.
    cp "$ks_folder/kek" /root/ks-kek
    opens
}

# Wherever it is killed, volumes open, and the next call goes on.
case_another_key_encryption_key_in_spite_of_kills() {
    local old number
    ready
    old=$(sha256sum <"$ks_folder/kek")
    for number in 2 4; do
        kill_at fsync,fdatasync "$number"
        opens
    done
    # The new one is about to take the old one's place.
    kill_at rename,renameat,renameat2 1
    opens
    rotation_under_way || fail 'the rotation was over before it was killed'
    systemctl kill --signal KILL volcryptd
    rotate
    [ "$(sha256sum <"$ks_folder/kek")" != "$old" ] || fail 'the key-encryption key is the old one'
    [ ! -e "$ks_folder/kek.new" ] || fail 'the new key-encryption key has not taken the place of the old one'
    ! rotation_under_way || fail 'the rotation is not over'
    systemctl restart volcryptd
    opens
    expect_contains "$(volcrypt audit show)" kek
    volcrypt audit verify >/dev/null
}

case_a_backup_from_before_needs_the_old_key_encryption_key() {
    ready
    stop_daemon
    expect_fails volcrypt key restore "$ks_backup"
    echo "$OUTPUT"
    start_daemon
    opens
}

case_a_restored_store_opens_the_volume_and_the_data_is_right() {
    ready
    volume_create later 8
    stop_daemon
    mv "$ks_folder/kek" /root/ks-kek.new
    install -m 600 /root/ks-kek "$ks_folder/kek"
    volcrypt key restore "$ks_backup"
    start_daemon
    opens
    # The guest that had its volume all the time, and the same volume from the restored key.
    qemu_io ks sda 'read -P 0xa0 0 64k'
    domain_destroy ks
    nothing_left
    domain_start ks
    qemu_io ks sda 'read -P 0xa0 0 64k'
    # What was enrolled after the backup is unknown.
    [[ $(volcrypt volume list) != *prot-later-0* ]] || fail 'the store knows a volume that the backup cannot know'
    expect_fails disk_attach ks "$(lun_path prot-later)" sdb
    expect_contains "$OUTPUT" 'Required key not available'
    volcrypt audit verify >/dev/null
}

# ready: domain `ks` runs on LUN 0, and both LUNs were written to.
ready() {
    [ "$(virsh --quiet domstate ks 2>/dev/null)" != running ] || return 0
    protect
    volume_create ks 8 2
    domain_define ks <(disk_xml "$(lun_path prot-ks 0)" sda)
    domain_start ks
    qemu_io ks sda 'write -P 0xa0 0 64k'
    disk_attach ks "$(lun_path prot-ks 1)" sdb
    qemu_io ks sdb 'write -P 0xa1 0 64k'
    detached
    expect_ciphertext ks 0 a0
    expect_ciphertext ks 1 a1
}

# opens: LUN 1 attaches with its data, and LUN 0 is as it was.
opens() {
    disk_attach ks "$(lun_path prot-ks 1)" sdb
    qemu_io ks sdb 'read -P 0xa1 0 64k'
    detached
    qemu_io ks sda 'read -P 0xa0 0 64k'
}

detached() {
    disk_detach ks sdb
    wait_until 20 only_lun_0
}

only_lun_0() {
    [ "$(mappings)" = volcrypt-prot-ks-0 ]
}

rotate() {
    wait_until 60 volcrypt status
    volcrypt key rotate-kek
}

rotation_under_way() {
    [ "$(sqlite3 -readonly "$ks_folder/volcrypt.db" "SELECT count(*) FROM keks WHERE state = 'outgoing'")" -eq 1 ]
}

# kill_at CALLS NUMBER: begins a rotation, or goes on with it, and has the daemon killed as it enters these system calls
# the so many-th time.
kill_at() {
    local daemon strace
    wait_until 60 volcrypt status
    # Or what is merged of the records before would be among the calls that are counted.
    wait_until 60 test ! -s "$ks_folder/volcrypt.db-wal"
    daemon=$(systemctl show --property MainPID --value volcryptd)
    strace -f -qq -o /run/lab-ks.strace -e "trace=$1" -e "inject=$1:signal=KILL:when=$2" -p "$daemon" &
    strace=$!
    wait_until 60 traced "$daemon" "$strace"
    expect_fails volcrypt key rotate-kek
    echo "killed at $1 $2: $OUTPUT"
    wait_until 60 test ! -e "/proc/$daemon"
    wait "$strace" || true
}
