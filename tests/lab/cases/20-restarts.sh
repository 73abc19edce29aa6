# shellcheck shell=bash
# Whatever is restarted while guests run, the daemon above all: the guests run on, and an open that waits
# meanwhile is answered.

# The daemon's process; 0 while there is none.
daemon_pid() {
    systemctl show --property=MainPID --value volcryptd
}

daemon_active() {
    [ "$(systemctl is-active volcryptd)" = active ]
}

stored_listeners() {
    systemctl show --property=NFileDescriptorStore --value volcryptd
}

# alive: domain `re` is the QEMU that was started, runs and answers.
alive() {
    expect_eq "$(virsh --quiet domstate re)" running 'domain re'
    expect_eq "$(domain_pid re)" "$(cat /run/lab-re.pid)" 'process of domain re'
    expect_contains "$(virsh --quiet qemu-monitor-command re --hmp 'info status')" running 'the monitor'
}

# A thread of domain `re` waits in openat (257 on x86-64).
waits_in_open() {
    grep -qs '^257 ' "/proc/$(domain_pid re)"/task/*/syscall
}

# attach_begin: LUN 1 to domain `re` in the background; attach_end waits for it. A minute is far more than
# the daemon's restart and its deadline for an open take together.
attach_begin() {
    disk_xml "$(lun_path prot-re 1)" sdb >/run/lab-re.xml
    timeout 60 virsh --quiet attach-device re /run/lab-re.xml --live >/run/lab-re.out 2>&1 &
    attaching=$!
}

attach_end() {
    CODE=0
    wait "$attaching" || CODE=$?
    OUTPUT=$(cat /run/lab-re.out)
}

# attach_outcome: after whatever happened the attach has succeeded or said why not, and an attach works.
attach_outcome() {
    attach_end
    alive
    wait_until 30 daemon_active
    case $CODE in
    0) ;;
    124) fail 'the attach hangs' ;;
    *)
        expect_contains "$OUTPUT" 'error: ' 'what virsh said'
        echo "  attach failed: $OUTPUT"
        disk_attach re "$(lun_path prot-re 1)" sdb
        ;;
    esac
    expect_mapped prot-re-1
    works sdb
    disk_detach re sdb
    nothing_left
}

# works TARGET_DEV: what is written can be read.
works() {
    qemu_io re "$1" "write -P 0xab $((RANDOM % 64))k 1k" >/dev/null
    qemu_io re "$1" 'write -P 0xcd 128k 4k' >/dev/null
    qemu_io re "$1" 'read -P 0xcd 128k 4k' >/dev/null
}

# kill_at STRACE_OPTION...: starts an attach and has the daemon killed as it enters a system call. Prints
# when the call is entered, so that a moment that never came is seen.
kill_at() {
    local daemon strace
    daemon=$(daemon_pid)
    strace -f -qq -o /run/lab-re.strace "$@" -p "$daemon" &
    strace=$!
    wait_until 20 grep -q "TracerPid:[[:space:]]*$strace\$" "/proc/$daemon/status"
    attach_begin
    wait_until 60 test ! -e "/proc/$daemon"
    wait "$strace" || true
    grep -q 'killed by SIGKILL' /run/lab-re.strace || fail "the daemon was not killed at $*"
}

case_prepare() {
    protect
    volume_create re 8 2
    domain_define re
    domain_start re
    domain_pid re >/run/lab-re.pid
    alive
    expect_eq "$(stored_listeners)" 1 'stored listeners'
}

case_killed_at_ten_times_of_an_attach() {
    local begun length part
    begun=$(date +%s%N)
    disk_attach re "$(lun_path prot-re 1)" sdb
    length=$((($(date +%s%N) - begun) / 1000000))
    disk_detach re sdb
    for part in 0 15 30 40 50 60 70 80 90 105; do
        echo "killed after $((length * part / 100)) of $length ms"
        attach_begin
        sleep "$(printf '%d.%03d' $((length * part / 100000)) $((length * part / 100 % 1000)))"
        systemctl kill --signal=KILL volcryptd
        attach_outcome
    done
}

case_killed_inside_the_open() {
    local control=/dev/mapper/control listener='anon_inode:seccomp notify'
    echo 'as the call is received'
    kill_at -P "$listener" -e inject=ioctl:signal=KILL:when=1
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
    echo 'before it looks for the mapping'
    kill_at -P "$control" -e inject=ioctl:signal=KILL:when=1
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
    echo 'before it makes the mapping'
    kill_at -P "$control" -e inject=ioctl:signal=KILL:when=2
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
    echo 'when the mapping has no table'
    kill_at -P "$control" -e inject=ioctl:signal=KILL:when=3
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
    echo 'when its table is loaded'
    kill_at -P "$control" -e inject=ioctl:signal=KILL:when=4
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
    echo 'before it opens the mapping'
    kill_at -P /dev/dm-0 -e inject=openat:signal=KILL:when=1
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
    echo 'before the mapping is flagged for removal'
    kill_at -P /dev/dm-0 -e inject=fstat,newfstatat:signal=KILL:when=1
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
    echo 'before it hands the mapping over'
    kill_at -P "$listener" -e inject=ioctl:signal=KILL:when=2
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
    echo 'when the mapping is handed over'
    kill_at -e inject=sendmsg,sendto:signal=KILL:when=1
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
}

# The daemon has received the call, and so has its successor, which dies as well, and so on.
case_killed_again_and_again() {
    local since
    since=$(date +@%s)
    kill_at -P /dev/mapper/control -e inject=ioctl:signal=KILL:when=1
    for _ in 1 2 3 4; do
        wait_until 20 daemon_active
        systemctl kill --signal=KILL volcryptd
    done
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
    expect_contains "$(journal_since "$since")" 'asks again for what it wants to open' 'the journal'
}

# A call that no daemon has received yet.
case_killed_before_it_receives() {
    local daemon
    daemon=$(daemon_pid)
    kill -STOP "$daemon"
    attach_begin
    wait_until 30 waits_in_open
    kill -KILL "$daemon"
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
}

case_detach_while_the_daemon_hangs() {
    local daemon
    disk_attach re "$(lun_path prot-re 1)" sdb
    works sdb
    daemon=$(daemon_pid)
    kill -STOP "$daemon"
    disk_detach re sdb
    nothing_left
    kill -CONT "$daemon"
}

# The disk sda stays from here on.
case_restarted_with_a_disk() {
    disk_attach re "$(lun_path prot-re 0)" sda
    qemu_io re sda 'write -P 0x5a 0 64k'
    systemctl restart volcryptd
    expect_eq "$(stored_listeners)" 1 'stored listeners'
    qemu_io re sda 'read -P 0x5a 0 64k'
    disk_attach re "$(lun_path prot-re 1)" sdb
    works sdb
    disk_detach re sdb
    wait_until 20 only_sda
    alive
}

# only_sda: the mapping of the disk sda, and no other.
only_sda() {
    [ "$(mappings)" = volcrypt-prot-re-0 ]
}

case_stopped_with_a_disk() {
    disk_attach re "$(lun_path prot-re 1)" sdb
    systemctl stop volcryptd
    expect_eq "$(stored_listeners)" 1 'stored listeners'
    qemu_io re sda 'read -P 0x5a 0 64k'
    disk_detach re sdb
    wait_until 20 only_sda

    attach_begin
    wait_until 30 waits_in_open
    sleep 2
    kill -0 "$attaching" || fail "an attach does not wait for the daemon: $(cat /run/lab-re.out)"
    systemctl start volcryptd
    attach_end
    expect_eq "$CODE" 0 "$OUTPUT"
    expect_mapped prot-re-1
    works sdb
    qemu_io re sda 'read -P 0x5a 0 64k'
    disk_detach re sdb
    wait_until 20 only_sda
    alive
}

case_libvirtd_restarted() {
    systemctl restart libvirtd
    wait_until 60 virsh --quiet list
    alive
    qemu_io re sda 'read -P 0x5a 0 64k'
    disk_attach re "$(lun_path prot-re 1)" sdb
    works sdb
    disk_detach re sdb
    disk_detach re sda
    nothing_left
    disk_attach re "$(lun_path prot-re 0)" sda
    qemu_io re sda 'read -P 0x5a 0 64k'
}

case_upgraded_with_a_disk() {
    local daemon born reading code=0
    local packages=(/lab/files/volcrypt_*.deb)
    [ -f "${packages[0]}" ] || fail 'there is no package in /lab/files'
    daemon=$(daemon_pid)
    born=$(cat /sys/block/dm-*/diskseq)
    while qemu_io re sda 'read -P 0x5a 0 64k' && qemu_io re sda 'write -P 0xa5 64k 4k' &&
        qemu_io re sda 'read -P 0xa5 64k 4k' && [ ! -e /run/lab-re.upgraded ]; do :; done >/dev/null &
    reading=$!
    DEBIAN_FRONTEND=noninteractive dpkg --install --force-confold "${packages[0]}" || code=$?
    touch /run/lab-re.upgraded
    wait "$reading" || fail 'the guest could not use its disk during the upgrade'
    rm /run/lab-re.upgraded
    expect_eq "$code" 0 'exit code of dpkg'
    wait_until 30 daemon_active
    [ "$(daemon_pid)" != "$daemon" ] || fail 'the daemon was not restarted'
    expect_eq "$(cat /sys/block/dm-*/diskseq)" "$born" 'sequence number of the mapping'
    expect_eq "$(stored_listeners)" 1 'stored listeners'
    alive

    disk_attach re "$(lun_path prot-re 1)" sdb
    works sdb
    disk_detach re sdb
    disk_detach re sda
    nothing_left
}

case_no_listener_outlives_its_guest() {
    domain_destroy re
    wait_until 20 no_stored_listener
    expect_eq "$(volcrypt status --json | jq '.guests | length')" 0 'guests'
    nothing_left
}

no_stored_listener() {
    [ "$(stored_listeners)" = 0 ]
}
