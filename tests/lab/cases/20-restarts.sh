# shellcheck shell=bash
# Whatever is restarted while guests run, the daemon above all: the guests run on, and an open that waits
# meanwhile is answered.
# takes: 630
# always: yes

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
    expect_eq "$(domain_pid re)" "$(cat /run/lab-re.pid)" 'process of domain re'
    expect_eq "$(virsh --quiet "domstate re; qemu-monitor-command re --hmp 'info status'" | tr -s '\r\n' ' ')" \
        'running VM status: running ' 'domain re'
}

# A thread of domain `re` waits in openat (257 on x86-64).
waits_in_open() {
    grep -qs '^257 ' "/proc/$(domain_pid re)"/task/*/syscall
}

# attach_begin: LUN 1 to domain `re` in the background; attach_end waits for it. The time is far more than
# the daemon's restart and its deadline for an open take together.
attach_begin() {
    disk_xml "$(lun_path prot-re 1)" sdb >/run/lab-re.xml
    timeout 200 virsh --quiet attach-device re /run/lab-re.xml --live >/run/lab-re.out 2>&1 &
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

# works TARGET_DEV: what is written, each time another byte, can be read.
works() {
    local byte=$((RANDOM % 255 + 1))
    qemu_io re "$1" "write -P $byte 128k 4k" >/dev/null
    qemu_io re "$1" "read -P $byte 128k 4k" >/dev/null
}

# kill_at STRACE_OPTION...: starts an attach and has the daemon killed as it enters a system call.
kill_at() {
    local daemon strace
    daemon=$(daemon_pid)
    strace -f -qq -o /run/lab-re.strace "$@" -p "$daemon" &
    strace=$!
    wait_until 60 traced "$daemon" "$strace"
    attach_begin
    if ! (wait_until 60 test ! -e "/proc/$daemon"); then
        kill "$strace"
        fail "the daemon was not killed at $*"
    fi
    wait "$strace" || true
}

# ready: domain `re` runs. Sets it up if it is not there, as at the beginning and after a failure.
ready() {
    local mapping
    if [ "$(virsh --quiet domstate re 2>/dev/null)" != running ]; then
        for mapping in $(mappings); do
            dmsetup remove --retry "$mapping"
        done
        systemctl start volcryptd
        protect
        volume_create re 8 2
        domain_define re
        domain_start re
        domain_pid re >/run/lab-re.pid
        expect_eq "$(stored_listeners)" 1 'stored listeners'
    fi
    alive
}

# with_sda: and has the disk sda, whose first 64 KiB are 0x5a.
with_sda() {
    ready
    only_sda && return
    disk_attach re "$(lun_path prot-re 0)" sda
    qemu_io re sda 'write -P 0x5a 0 64k'
}

# only_sda: the mapping of the disk sda is there, and no other.
only_sda() {
    [ "$(mappings)" = volcrypt-prot-re-0 ]
}

case_killed_at_ten_times_of_an_attach() {
    local begun length part
    ready
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

# killed_at MOMENT STRACE_OPTION...: the attach succeeds all the same, by the daemon's successor.
killed_at() {
    echo "killed $1"
    shift
    kill_at "$@"
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
}

# next_node: the node of the mapping that this daemon makes next. It gives the numbers one after the other.
next_node() {
    local minor
    disk_attach re "$(lun_path prot-re 1)" sdb >/dev/null
    minor=$(dmsetup info --columns --noheadings --options minor volcrypt-prot-re-1)
    disk_detach re sdb >/dev/null
    wait_until 20 sdb_is_unmapped
    echo "/dev/dm-$((minor + 1))"
}

sdb_is_unmapped() {
    ! mappings | grep -qx volcrypt-prot-re-1
}

case_killed_inside_the_open() {
    local control=/dev/mapper/control listener='anon_inode:seccomp notify'
    ready
    killed_at 'as it receives the call' -P "$listener" -e inject=ioctl:signal=KILL:when=1
    killed_at 'before it looks for the mapping' -P "$control" -e inject=ioctl:signal=KILL:when=1
    killed_at 'before it makes the mapping' -P "$control" -e inject=ioctl:signal=KILL:when=2
    killed_at 'when the table is loaded' -P "$control" -e inject=ioctl:signal=KILL:when=5
    killed_at 'before it opens the mapping' -P "$(next_node)" -e inject=open,openat:signal=KILL:when=1
    killed_at 'before it flags the mapping for removal' -P "$(next_node)" -e inject=fstat,newfstatat:signal=KILL:when=1
    killed_at 'before it hands the mapping over' -P "$listener" -e inject=ioctl:signal=KILL:when=2
    killed_at 'after it handed the mapping over' -e inject=sendmsg,sendto:signal=KILL:when=1
}

case_killed_before_the_mapping_has_a_table() {
    ready
    killed_at 'before it loads the table' -P /dev/mapper/control -e inject=ioctl:signal=KILL:when=3
}

# The daemon has received the call and dies, and its successors die before they are ready to receive it.
case_killed_again_and_again() {
    local since before
    ready
    since=$(date +@%s)
    before=$(daemon_pid)
    kill_at -P /dev/mapper/control -e inject=ioctl:signal=KILL:when=1
    for _ in 1 2 3 4; do
        wait_until 20 another_daemon_than "$before"
        before=$(daemon_pid)
        kill -KILL "$before" || true
    done
    attach_outcome
    expect_eq "$CODE" 0 "$OUTPUT"
    expect_contains "$(journal_since "$since")" 'asks again for what it wants to open' 'the journal'
}

another_daemon_than() {
    local daemon
    daemon=$(daemon_pid)
    [ "$daemon" != 0 ] && [ "$daemon" != "$1" ]
}

# A call that no daemon has received yet.
case_killed_before_it_receives() {
    local daemon
    ready
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
    ready
    disk_attach re "$(lun_path prot-re 1)" sdb
    works sdb
    daemon=$(daemon_pid)
    kill -STOP "$daemon"
    disk_detach re sdb
    nothing_left
    kill -CONT "$daemon"
}

case_restarted_with_a_disk() {
    with_sda
    systemctl restart volcryptd
    expect_eq "$(stored_listeners)" 1 'stored listeners'
    qemu_io re sda 'read -P 0x5a 0 64k'
    disk_attach re "$(lun_path prot-re 1)" sdb
    works sdb
    disk_detach re sdb
    wait_until 20 only_sda
    alive
}

case_stopped_with_a_disk() {
    with_sda
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
    with_sda
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
    with_sda
    daemon=$(daemon_pid)
    born=$(cat /sys/block/dm-*/diskseq)
    while qemu_io re sda 'read -P 0x5a 0 64k' && qemu_io re sda 'write -P 0xa5 64k 4k' &&
        qemu_io re sda 'read -P 0xa5 64k 4k' && [ ! -e /run/lab-re.upgraded ]; do sleep 1; done >/dev/null &
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
    ready
    domain_destroy re
    wait_until 20 no_stored_listener
    expect_eq "$(volcrypt status --json | jq '.guests | length')" 0 'guests'
    nothing_left
}

no_stored_listener() {
    [ "$(stored_listeners)" = 0 ]
}
