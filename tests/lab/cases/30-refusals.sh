# shellcheck shell=bash
# shellcheck disable=SC2154 # The helpers that are sourced first assign what is not assigned here.
# What must not be opened is not: each refusal with the errno that an attach shows, the sentence in the
# journal or on virsh's terminal, and nothing changed by it.
# LUNs of prot-rf: 0 is enrolled; 1 is blank; 2 holds a file system; 3 a byte somewhere; 4 and 5 are blank.
# machine: second
# takes: 720
# always: yes

rf_hook=/etc/libvirt/hooks/qemu.d/50-volcrypt
rf_database=/var/lib/volcrypt/volcrypt.db
rf_kek=/var/lib/volcrypt/kek
rf_small=/var/lib/volcrypt/small
rf_unrecorded='the key of volume prot-rf-0 is not used because the audit log cannot be written'

# ready: domain `rf` runs, LUN 0 is enrolled, the rule creates no keys.
ready() {
    [ "$(virsh --quiet domstate rf 2>/dev/null)" != running ] || return 0
    mend
    protect
    target_create prot-rf 4 6
    # What makes an ext4 of a superblock: its magic number, revision 1, and extents.
    put 2 1080 '\x53\xef'
    put 2 1100 '\x01'
    put 2 1120 '\x40'
    put 3 2500000 x
    target_login prot-rf
    volcrypt volume enrol "$(lun_path prot-rf 0)" >/dev/null
    domain_define rf
    domain_start rf
    opens
    lun_sums >/run/lab-rf.sums
}

# mend: takes back what a function that failed half-way may have left.
mend() {
    systemctl stop volcryptd 2>/dev/null || true
    ! mountpoint --quiet "$rf_small" || umount "$rf_small"
    ! mountpoint --quiet /var/lib/volcrypt || umount /var/lib/volcrypt
    [ ! -e "$rf_kek.away" ] || mv "$rf_kek.away" "$rf_kek"
    [ ! -e /run/lab-hook ] || mv /run/lab-hook "$rf_hook"
    rm -f /etc/libvirt/hooks/qemu.d/60-lab
    with_daemon
}

# put LUN POSITION BYTES: into what stands on the storage server.
put() {
    printf %b "$3" | dd of="$(lun_backing prot-rf "$1")" bs=1 seek="$2" conv=notrunc status=none
}

# opens [LUN]: the volume attaches, is written and read, and leaves nothing.
opens() {
    disk_attach rf "$(lun_path prot-rf "${1:-0}")" sdb
    qemu_io rf sdb 'write -P 0x5a 0 4k' >/dev/null
    qemu_io rf sdb 'read -P 0x5a 0 4k' >/dev/null
    disk_detach rf sdb
    nothing_left
}

lun_sums() {
    sync
    sha256sum "$(dirname "$(lun_backing prot-rf)")"/*
}

unharmed() {
    nothing_left
    expect_eq "$(lun_sums)" "$(cat /run/lab-rf.sums)" 'checksums of the LUNs'
    expect_eq "$(virsh --quiet domstate rf)" running 'domain rf'
}

# now: with fractions, so that no sentence of an earlier refusal is taken for this one's.
now() {
    date +@%s.%6N
}

# said SINCE SENTENCE: the daemon has said so.
said() {
    [[ $(journal_since "$1") == *"$2"* ]]
}

# attach_refused LUN ERRNO SENTENCE
attach_refused() {
    local since
    since=$(now)
    expect_fails disk_attach rf "$(lun_path prot-rf "$1")" sdb
    expect_contains "$OUTPUT" "$2" 'what virsh said'
    (wait_until 10 said "$since" "$3") || fail "expected '$3' in the journal: $(journal_since "$since")"
    unharmed
}

# start_refused SENTENCE DISK_XML [SED_SCRIPT]: of a domain with that disk; the script changes its definition.
start_refused() {
    local definition=/run/lab-rs.xml
    echo "$2" >/run/lab-rs.disk
    domain_define rs /run/lab-rs.disk
    if [ $# -gt 2 ]; then
        virsh --quiet dumpxml rs --inactive | sed "$3" >"$definition"
        virsh --quiet define "$definition" >/dev/null
    fi
    expect_fails domain_start rs
    expect_contains "$OUTPUT" "$1" 'what virsh said'
    domain_undefine rs
    unharmed
}

# start_refused_lun LUN SENTENCE
start_refused_lun() {
    start_refused "$2" "$(disk_xml "$(lun_path prot-rf "$1")" sda)"
}

case_no_key() {
    ready
    attach_refused 1 'Required key not available' \
        "volume prot-rf-1 on $(lun_device prot-rf 1) has no key and rule \"lab\" does not create keys"
    start_refused_lun 1 'disk sda: volume prot-rf-1 on '
}

case_data_is_not_overwritten() {
    ready
    protect 'create_keys = true'
    attach_refused 2 'Wrong medium type' 'holds an ext4 file system, so volume prot-rf-2 is not enrolled'
    attach_refused 3 'Wrong medium type' 'holds data at byte 2500000, so volume prot-rf-3 is not enrolled'
    start_refused_lun 2 'holds an ext4 file system'
    expect_fails volcrypt volume enrol "$(lun_path prot-rf 2)"
    expect_contains "$OUTPUT" 'holds an ext4 file system'
    opens 1
    expect_ciphertext rf 1 5a
    lun_sums >/run/lab-rf.sums
    protect
}

case_wrong_key() {
    local manager=('[key_manager]' 'type = "key-file"' 'file = "/etc/volcrypt/lab.key"' 'i_know_this_is_insecure = true')
    ready
    (umask 077 && head -c 32 /dev/urandom >/etc/volcrypt/lab.key)
    protect "${manager[@]}"
    attach_refused 0 'Key was rejected by service' 'has 256 bits and not the 512 it was enrolled with'
    (umask 077 && head -c 64 /dev/urandom >/etc/volcrypt/lab.key)
    protect "${manager[@]}"
    attach_refused 0 'Key was rejected by service' 'for volume prot-rf-0 is not the one it was enrolled with'
    start_refused_lun 0 'for volume prot-rf-0 is not the one it was enrolled with'
    rm /etc/volcrypt/lab.key
    protect
    opens
}

# with_byte_changed BYTE...: for each of these bytes of volume prot-rf-0's wrapped key: changes a bit of it,
# runs the command in $COMMAND, prints its exit code and the last line it said, and changes the bit back.
with_byte_changed() {
    python3 - "$rf_database" "$COMMAND" "$@" <<'PYTHON'
import sqlite3, subprocess, sys
database = sqlite3.connect(sys.argv[1], isolation_level=None)

def flip(byte):
    (wrapped,) = database.execute("SELECT wrapped FROM keys WHERE volume_id = 'prot-rf-0'").fetchone()
    changed = bytearray(wrapped)
    changed[byte] ^= 1
    database.execute("UPDATE keys SET wrapped = ? WHERE volume_id = 'prot-rf-0'", (bytes(changed),))

for byte in map(int, sys.argv[3:]):
    flip(byte)
    ran = subprocess.run(sys.argv[2], shell=True, capture_output=True, text=True)
    flip(byte)
    said = (ran.stdout + ran.stderr).strip().splitlines()
    print(ran.returncode, said[-1] if said else "")
PYTHON
}

# A format byte, a nonce of 12 bytes, the key of 64, a tag of 16. The daemon is not restarted: it reads the
# record each time.
case_damaged_key_record() {
    local since
    local sentence='the key record of volume prot-rf-0 is damaged (it is not what was written): restore the database from backup'
    local COMMAND='volcrypt volume export-key prot-rf-0 --to /run/lab-rf.key'
    ready
    rm -f /run/lab-rf.key
    $COMMAND >/dev/null
    expect_eq "$(stat -c %s /run/lab-rf.key)" 64 'bytes of the key'
    rm /run/lab-rf.key
    with_byte_changed {0..92} >/run/lab-rf.said
    expect_eq "$(wc -l </run/lab-rf.said)" 93 'bytes that were changed'
    expect_eq "$(sort /run/lab-rf.said | uniq)" "1 volcrypt: $sentence
1 volcrypt: ${sentence/it is not what was written/its format is unknown}" 'what was said'
    [ ! -e /run/lab-rf.key ] || fail 'a key came out of a damaged record'

    disk_xml "$(lun_path prot-rf 0)" sdb >/run/lab-rf.disk
    since=$(now)
    COMMAND='virsh --quiet attach-device rf /run/lab-rf.disk --live'
    with_byte_changed 0 20 92 >/run/lab-rf.said
    expect_eq "$(grep -c '^1 .*Required key not available$' /run/lab-rf.said)" 3 "refusals: $(cat /run/lab-rf.said)"
    wait_until 10 said "$since" "$sentence"
    unharmed
    opens
}

case_key_encryption_key() {
    ready
    mv "$rf_kek" "$rf_kek.away"
    systemctl restart volcryptd
    attach_refused 0 'Required key not available' "$rf_kek"
    start_refused_lun 0 "$rf_kek"
    [ ! -e "$rf_kek" ] || fail 'a new key-encryption key was made'
    (umask 077 && head -c 32 /dev/urandom >"$rf_kek")
    systemctl restart volcryptd
    attach_refused 0 'Required key not available' "restore the credential volcrypt.kek or $rf_kek from backup"
    mv "$rf_kek.away" "$rf_kek"
    systemctl restart volcryptd
    opens
}

# The device goes when the hook has seen it and before QEMU opens it; and long before.
case_device_gone() {
    local hook=/etc/libvirt/hooks/qemu.d/60-lab
    ready
    disk_xml "$(lun_path prot-rf 0)" sda >/run/lab-rs.disk
    domain_define rs /run/lab-rs.disk
    cat >"$hook" <<HOOK
#!/bin/sh
[ "\$1 \$2" != 'rs prepare' ] || echo 1 >/sys/block/$(basename "$(lun_device prot-rf 0)")/device/delete
HOOK
    chmod 755 "$hook"
    expect_fails domain_start rs
    rm "$hook"
    [ ! -e "$(lun_path prot-rf 0)" ] || fail 'the device has not gone'
    unharmed
    expect_fails domain_start rs
    expect_fails disk_attach rf "$(lun_path prot-rf 0)" sdb
    domain_undefine rs
    unharmed
    target_logout prot-rf
    target_login prot-rf
    opens
}

# other_disk SERIAL: what is LUN 0 has another serial number, and so another WWID.
other_disk() {
    local unit=$lab_configfs/iscsi/$lab_iqn:prot-rf/tpgt_1/lun/lun_0/prot-rf.0 backstore
    backstore=$lab_configfs/core/fileio_0/prot-rf.0
    target_logout prot-rf
    rm "$unit"
    echo "$1" >"$backstore/wwn/vpd_unit_serial"
    ln -s "$backstore" "$unit"
    target_login prot-rf
}

case_another_disk_in_its_place() {
    local enrolled found
    ready
    enrolled=$(volcrypt volume show prot-rf-0 --json | jq --raw-output .device.wwid)
    other_disk "$(echo another | md5sum | cut -c 1-32)"
    found=$(cat "/sys/block/$(basename "$(lun_device prot-rf 0)")/device/wwid")
    [ "$enrolled" != "$found" ] || fail 'it has the same WWID'
    attach_refused 0 'Wrong medium type' "its WWID was \"$enrolled\" and is \"$found\""
    start_refused_lun 0 "its WWID was \"$enrolled\" and is \"$found\""
    other_disk "$(echo prot-rf.0 | md5sum | cut -c 1-32)"
    opens
}

case_database_is_read_only() {
    local since
    ready
    # What is not merged yet could not be read then.
    wait_until 10 test ! -s "$rf_database-wal"
    mount --bind /var/lib/volcrypt /var/lib/volcrypt
    mount -o remount,bind,ro /var/lib/volcrypt
    systemctl restart volcryptd
    expect_fails volcrypt volume enrol "$(lun_path prot-rf 4)"
    expect_contains "$OUTPUT" 'is read-only: nothing can be enrolled, destroyed or recorded'
    attach_refused 0 'Read-only file system' "$rf_unrecorded"
    start_refused_lun 0 "disk sda: $rf_unrecorded"
    protect '[audit]' 'when_unwritable = "continue"'
    since=$(now)
    opens
    wait_until 10 said "$since" 'a use of the key of volume prot-rf-0 is not in the audit log'
    systemctl stop volcryptd
    umount /var/lib/volcrypt
    protect
    opens
    volcrypt audit verify
}

case_disk_is_full() {
    ready
    mkdir -p "$rf_small"
    mount -t tmpfs -o size=1m,mode=700 lab "$rf_small"
    protect '[key_manager]' "directory = \"$rf_small\""
    volcrypt volume enrol "$(lun_path prot-rf 4)" >/dev/null
    # A smaller block than one of SQLite's pages leaves no room for the next.
    dd if=/dev/zero of="$rf_small/ballast" bs=512 status=none 2>/dev/null || true
    expect_fails volcrypt volume enrol "$(lun_path prot-rf 5)"
    expect_contains "$OUTPUT" 'the disk is full: free some space there and repeat'
    attach_refused 4 'Read-only file system' "${rf_unrecorded/-0/-4}"
    systemctl restart volcryptd
    start_refused_lun 4 'the disk is full: free some space there and repeat'
    protect '[key_manager]' "directory = \"$rf_small\"" '[audit]' 'when_unwritable = "continue"'
    opens 4
    rm "$rf_small/ballast"
    protect '[key_manager]' "directory = \"$rf_small\""
    opens 4
    volcrypt audit verify
    volcrypt volume enrol "$(lun_path prot-rf 5)" >/dev/null
    protect
    umount "$rf_small"
    rmdir "$rf_small"
    lun_sums >/run/lab-rf.sums
    opens
}

case_faulty_configuration() {
    local since line
    ready
    since=$(now)
    protect 'nonsense = 1'
    line=$(grep -n nonsense "$volcrypt_config" | cut -d : -f 1)
    wait_until 10 said "$since" "$volcrypt_config:$line: "
    expect_fails volcrypt config check
    expect_contains "$OUTPUT" "$volcrypt_config:$line: "
    attach_refused 0 'Operation not supported' "$volcrypt_config:$line: "
    start_refused_lun 0 "$volcrypt_config:$line: "

    truncate --size 1M /var/lib/libvirt/images/rf.img
    disk_xml /var/lib/libvirt/images/rf.img sdb | sed "s/type='block'/type='file'/; s/source dev/source file/" >/run/lab-rf.file
    virsh --quiet attach-device rf /run/lab-rf.file --live
    qemu_io rf sdb 'write -P 0x11 0 4k'
    disk_detach rf sdb
    rm /var/lib/libvirt/images/rf.img

    protect
    volcrypt config check >/dev/null
    opens
}

case_past_the_encryption() {
    local disk unit
    ready
    disk=$(disk_xml "$(lun_path prot-rf 0)" sda)
    start_refused "run 'volcrypt domain adopt rs'" "$disk" 's,<emulator>.*,<emulator>/usr/bin/qemu-system-x86_64</emulator>,'
    start_refused "device='lun' passes SCSI commands around its encryption" "${disk/device=\'disk\'/device=\'lun\'}"
    unit=$lab_iqn:prot-rf/0
    start_refused "LUN 0 of $lab_iqn:prot-rf is or may be a protected volume" "<disk type='network' device='disk'>
        <driver name='qemu' type='raw'/>
        <source protocol='iscsi' name='$unit'><host name='127.0.0.1' port='3260'/></source>
        <target dev='sda' bus='scsi'/></disk>"
    echo "${disk/device=\'disk\'/device=\'lun\'}" >/run/lab-rf.disk
    expect_fails virsh --quiet attach-device rf /run/lab-rf.disk --live
    unharmed
}

# without_daemon: there is none, and libvirtd, which wants its sockets, starts none.
without_daemon() {
    systemctl stop volcryptd.service volcryptd.socket volcryptd-control.socket
    systemctl mask --quiet --runtime volcryptd.service volcryptd.socket volcryptd-control.socket
}

with_daemon() {
    [ ! -e /run/systemd/system/volcryptd.service ] ||
        systemctl unmask --quiet --runtime volcryptd.service volcryptd.socket volcryptd-control.socket
    systemctl start volcryptd.socket volcryptd-control.socket volcryptd.service
}

case_no_daemon() {
    local log=/var/log/libvirt/qemu/rs.log from=1
    ready
    domain_destroy rf
    domain_define plain
    without_daemon
    expect_fails domain_start plain
    expect_contains "$OUTPUT" 'volcryptd cannot be reached on /run/volcrypt/control.sock'
    disk_xml "$(lun_path prot-rf 0)" sda >/run/lab-rs.disk
    domain_define rs /run/lab-rs.disk
    expect_fails domain_start rs
    expect_contains "$OUTPUT" 'volcryptd cannot be reached on /run/volcrypt/control.sock'

    printf '%s\n' '[hook]' 'when_daemon_unreachable = "start-unprotected"' >>"$volcrypt_config"
    domain_start plain
    expect_fails domain_start rs
    expect_contains "$OUTPUT" 'disk sda of domain rs is protected and cannot be opened now'
    domain_destroy plain
    nothing_left

    mv "$rf_hook" /run/lab-hook
    systemctl restart libvirtd
    [ ! -e "$log" ] || from=$(($(stat -c %s "$log") + 1))
    expect_fails domain_start rs
    mv /run/lab-hook "$rf_hook"
    systemctl restart libvirtd
    (wait_until 30 log_has "$log" "$from" 'volcrypt-qemu: volcryptd cannot be reached on /run/volcrypt/wrapper.sock') ||
        fail "the wrapper did not say why: $(tail "$log")"
    expect_eq "$(lun_sums)" "$(cat /run/lab-rf.sums)" 'checksums of the LUNs'

    with_daemon
    protect
    domain_undefine rs
    domain_undefine plain
    domain_start rf
    opens
}

# hook ARGUMENT...: runs the hook as libvirt does, but with a standard input that never ends. It must not
# take long, and print nothing on standard output.
hook() {
    local code=0
    timeout 90 "$rf_hook" "$@" >/run/lab-hook.out 2>/run/lab-hook.err < <(exec sleep 300) || code=$?
    expect_eq "$(cat /run/lab-hook.out)" '' "standard output of $*"
    expect_eq "$code" 0 "exit code of $*: $(cat /run/lab-hook.err)"
}

case_hook_keeps_out_of_the_way() {
    local operation code
    ready
    virsh --quiet dumpxml rf >/run/lab-rf.xml
    for operation in 'prepare begin' 'start begin' 'started begin' 'stopped end' 'release end' 'migrate begin' \
        'restore begin' 'reconnect begin' 'attach begin' 'unheard of'; do
        # shellcheck disable=SC2086 # Two words.
        expect_eq "$("$rf_hook" rf $operation - </run/lab-rf.xml 2>&1)" '' "what the hook says to $operation"
    done
    # Also when it refuses.
    code=0
    sed "s,<devices>,<devices>$(disk_xml "$(lun_path prot-rf 3)" sdb | tr -d '\n')," /run/lab-rf.xml |
        "$rf_hook" rf prepare begin - >/run/lab-hook.out 2>/run/lab-hook.err || code=$?
    expect_eq "$code" 1 'exit code of a refusal'
    expect_eq "$(cat /run/lab-hook.out)" '' 'standard output of a refusal'
    expect_contains "$(cat /run/lab-hook.err)" 'volcrypt: disk sdb: '

    hook rf reconnect begin -
    hook rf unheard of
    echo 'nonsense' >>"$volcrypt_config"
    hook rf reconnect begin -
    systemctl stop volcryptd.service volcryptd.socket volcryptd-control.socket
    hook rf reconnect begin -
    hook rf unheard of -
    with_daemon
    protect
    opens
}
