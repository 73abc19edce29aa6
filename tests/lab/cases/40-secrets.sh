# shellcheck shell=bash
# A volume key is nowhere but in the daemon's memory and in the kernel, and the daemon's memory is its own.
# Most of it is done with the key-file key manager, because a key that is known can be looked for.
# takes: 420
# always: yes

key=/etc/volcrypt/lab.key
traces=/root/traces
drop_in=/run/systemd/system/volcryptd.service.d/lab.conf

# Looks for pieces of the key in files: 16 bytes from anywhere in it, as they are, in hexadecimal, in base64,
# or printed as a list of numbers. Whole processes' memory is searched for a few pieces only, and so is what is
# named raw:FILE.
finder=/root/find-key
write_finder() {
    cat >"$finder" <<'PYTHON'
import base64, re, sys

key = open(sys.argv[1], "rb").read()
assert len(key) == 64 and len(set(key)) > 32, "no key to look for"


def needles():
    for start in range(len(key) - 15):
        piece = key[start:start + 16]
        yield piece
        yield piece.hex().encode()
        yield piece.hex().upper().encode()
        yield base64.b64encode(piece[:15])
        yield base64.urlsafe_b64encode(piece[:15])
        yield ", ".join(map(str, piece[:8])).encode()


pattern = re.compile(b"|".join(map(re.escape, set(needles()))))
raw = re.compile(b"|".join(re.escape(key[at:at + 16]) for at in (0, 16, 32, 48)))


def memory(pid):
    with open(f"/proc/{pid}/maps") as maps, open(f"/proc/{pid}/mem", "rb", buffering=0) as mem:
        for line in maps:
            span, rights, _, _, inode = line.split()[:5]
            start, end = (int(part, 16) for part in span.split("-"))
            # What was never written to, such as code and an emulator's reserves, is not in it.
            if not rights.startswith("rw") or end - start > 256 << 20:
                continue
            try:
                mem.seek(start)
                if raw.search(mem.read(end - start)):
                    return True
            except OSError:
                pass
    return False


found = False
for name in sys.argv[2:]:
    if name.startswith("pid:"):
        hit = memory(int(name[4:]))
    elif name.startswith("raw:"):
        hit = raw.search(open(name[4:], "rb").read())
    else:
        try:
            content = open(name, "rb").read() if name != "-" else sys.stdin.buffer.read()
        except OSError:
            continue
        # strace -xx writes every byte of a message as \x and two digits.
        plain = re.sub(rb"\\x([0-9a-f]{2})", lambda match: bytes([int(match[1], 16)]), content)
        hit = pattern.search(content) or pattern.search(plain)
    if hit:
        print(name)
        found = True
sys.exit(0 if found else 1)
PYTHON
}

# key_in FILE... or pid:PID... or raw:FILE... or -: prints those that hold a piece of the key; fails if none does.
key_in() {
    python3 "$finder" "$key" "$@"
}

# expect_no_key WHAT FILE...
expect_no_key() {
    local found
    ! found=$(key_in "${@:2}") || fail "the key is in $1: $found"
}

daemon_pid() {
    systemctl show --property MainPID --value volcryptd
}

# A search that finds nothing proves nothing unless it finds what is there.
case_the_search_finds_a_key() {
    local form
    write_finder
    # Some key, always the same, with hardly a byte twice in a row.
    (umask 077 && printf 'volcrypt lab' | openssl dgst -sha512 -binary >"$key")
    expect_eq "$(stat -c %s "$key")" 64 'size of the key'
    for form in cat 'xxd -plain -cols 64' 'xxd -plain -upper -cols 64' 'base64 --wrap=0' \
        "sed 's/^/xy/' | base64 --wrap=0" 'tail -c 20' "xxd -plain -cols 64 | sed 's/../\\\\x&/g'" \
        "od -An -v -t u1 -w64 | sed -E 's/ +/, /g'"; do
        expect_eq "$(eval "cat $key | $form" | key_in - || true)" - "search for the key after '$form'"
    done
    expect_fails key_in /etc/passwd
    expect_eq "$OUTPUT" ''
    # A key in a process's memory, of which its command line knows nothing.
    python3 -c 'import sys, time; kept = open(sys.argv[1], "rb").read(); print(flush=True); time.sleep(600)' "$key" \
        >/root/holder &
    wait_until 30 test -s /root/holder
    expect_eq "$(key_in pid:$! || true)" "pid:$!" 'search in memory'
    kill $!
    # A key in a table.
    dmsetup create lab-key --table "0 8 crypt aes-xts-plain64 $(xxd -plain -cols 64 "$key") 0 $(blank_loop) 0"
    expect_eq "$(dmsetup table --showkeys | key_in - || true)" - 'search in tables'
    dmsetup remove --retry lab-key
    losetup --detach-all
}

# From here on the daemon runs with the known key, says all it can say, and may leave core dumps as far as
# its limits go.
case_volumes_are_used_with_the_known_key() {
    local strace command
    mkdir -p "$(dirname "$drop_in")" "$traces"
    printf '%s\n' '[Service]' 'Environment=VOLCRYPT_LOG=trace' 'LimitCORE=infinity' >"$drop_in"
    systemctl daemon-reload
    date +%s >/root/since
    protect '[key_manager]' 'type = "key-file"' "file = \"$key\"" 'i_know_this_is_insecure = true'

    strace -f -xx -s 1000000 -e trace=sendmsg,recvmsg,sendto,recvfrom,write,writev -o "$traces/volcryptd" \
        -p "$(daemon_pid)" 2>/root/strace &
    strace=$!
    wait_until 60 grep -q attached /root/strace
    volume_create secret 16
    domain_define vm
    domain_start vm
    disk_attach vm "$(lun_path prot-secret)" sdb
    qemu_io vm sdb 'write -P 0xab 0 64k'
    qemu_io vm sdb 'flush'
    expect_mapped prot-secret-0
    # Made with the known key indeed, or the search is in vain.
    expect_ciphertext secret
    cryptsetup open --readonly --shared --type plain --cipher aes-xts-plain64 --key-size 512 --key-file "$key" \
        --keyfile-size 64 "$(readlink -e "$(lun_loop)")" opened
    cmp <(head -c 65536 /dev/zero | tr '\0' '\253') <(head -c 65536 /dev/mapper/opened)
    wait_until 30 cryptsetup close opened
    losetup --detach-all

    # The operator's command, as a process of its own; the daemon's trace holds its other end.
    for command in status 'volume list' 'volume show prot-secret-0 --json' 'key list --json'; do
        # shellcheck disable=SC2086 # Words of a command line.
        strace -f -xx -s 1000000 -e trace=sendmsg,recvmsg,sendto,recvfrom,read,write,writev \
            -o "$traces/${command%% -*}" volcrypt $command >/dev/null
    done
    kill "$strace"
    wait "$strace" || true
}

case_no_message_holds_a_key() {
    # What was said was seen: the hook's XML, the operator's questions, and QEMU's registration.
    decode "$traces/volcryptd" >/root/said
    grep -q '"operation":"prepare"' /root/said || fail "the hook's request is not in the trace"
    grep -q '""status"' /root/said || fail "the command's request is not in the trace"
    grep -q 'SCM_RIGHTS' "$traces/volcryptd" || fail "the wrapper's listener is not in the trace"
    decode "$traces/volume show prot-secret-0" | grep -q check_value ||
        fail "the command's answer is not in its trace"
    expect_no_key 'a message' "$traces"/*
}

case_no_table_process_or_keyring_holds_a_key() {
    expect_contains "$(dmsetup table --showkeys volcrypt-prot-secret-0)" ' :64:logon:volcrypt:prot-secret-0 ' table
    ! dmsetup table --showkeys | key_in - || fail 'the key is in a table'
    expect_no_key 'a command line or an environment' /proc/[0-9]*/cmdline /proc/[0-9]*/environ
    # The mapping is in use, and the key that made it is in no keyring any more.
    ! grep volcrypt: /proc/keys || fail 'the key is in a keyring'
    expect_no_key 'the memory of QEMU or libvirtd' "pid:$(domain_pid vm)" "pid:$(pidof libvirtd)"
}

case_no_log_holds_a_key() {
    local since
    since=$(cat /root/since)
    journalctl --no-pager --quiet --output export --since "@$since" >/root/journal
    expect_contains "$(journal_since "@$since")" 'got the mapping of volume prot-secret-0' journal
    # At trace level there is more than at info.
    expect_contains "$(tr '\0' '\n' <"/proc/$(daemon_pid)/environ")" VOLCRYPT_LOG=trace environment
    expect_no_key 'a log' /root/journal /var/log/libvirt/qemu/*.log
}

case_no_file_of_the_daemon_holds_a_key() {
    find /var/lib/volcrypt /run/volcrypt -type f >/root/files
    grep -q '/volcrypt.db$' /root/files
    mapfile -t files </root/files
    expect_no_key 'a file of the daemon' "${files[@]}"
    expect_eq "$(find /var/lib/volcrypt -perm /077)" '' 'files that others may touch'
}

case_the_daemons_memory_is_locked_and_its_own() {
    local pid file
    pid=$(daemon_pid)
    [ "$(status_kb VmLck)" -gt 0 ] || fail 'no memory is locked'
    # All of it: what is not resident cannot hold a key.
    [ "$(status_kb VmLck)" -ge "$(status_kb RssAnon)" ] || fail "not all memory is locked: $(grep Vm "/proc/$pid/status")"
    expect_eq "$(status_kb VmSwap)" 0 VmSwap
    # First something that this user may look at, lest everything fails for another reason.
    setpriv --reuid libvirt-qemu --regid kvm --clear-groups sleep 600 &
    wait_until 10 as_qemu head -c 1 "/proc/$!/maps"
    kill $!
    for file in mem maps environ fd/0 syscall; do
        expect_fails as_qemu head -c 1 "/proc/$pid/$file"
        expect_contains "$OUTPUT" 'Permission denied' "$file"
    done
}

# The kernel is made to swap out all it can, of the daemon's control group all the time that the key is used, and of all
# others afterwards: those that answer would do nothing but come back from there. A process that keeps another key in its
# memory shows that the search would find one.
case_swap_holds_no_key() {
    # Also where this fails, and then before the machine goes on.
    trap swap_off EXIT
    swap_on
    head -c 64 /dev/urandom >/root/bait.key
    systemd-run --quiet --unit lab-bait python3 -c 'import sys, time
kept = [open(sys.argv[1], "rb").read() * 64 for _ in range(4096)]
time.sleep(86400)' /root/bait.key
    (while :; do
        reclaim volcryptd.service
        reclaim lab-bait.service
        sleep 0.5
    done) &
    reclaiming=$!
    disk_detach vm sdb
    nothing_left
    disk_attach vm "$(lun_path prot-secret)" sdb
    qemu_io vm sdb 'read -P 0xab 0 64k'
    reclaim .
    wait_until 60 is_swapped_out "$(systemctl show --property MainPID --value lab-bait)"
    expect_mapped prot-secret-0
    kill "$reclaiming"
    wait "$reclaiming" || true
    swap_content >/root/swapped
    expect_eq "$(key=/root/bait.key key_in raw:/root/swapped || true)" raw:/root/swapped 'search in swap'
    expect_no_key swap raw:/root/swapped
    expect_eq "$(status_kb VmSwap)" 0 'VmSwap of the daemon'
}

# swap_on: 64 MiB, and the kernel prefers to swap rather than to drop what it has read.
swap_on() {
    # Written to, or what the kernel puts there past the file system could not be read as a file.
    (umask 077 && dd if=/dev/zero of=/root/swap bs=1M count=64 conv=fsync status=none)
    mkswap /root/swap >/dev/null
    swapon /root/swap
    sysctl --quiet --write vm.swappiness=200
}

swap_off() {
    [ -z "${reclaiming-}" ] || kill "$reclaiming" 2>/dev/null || true
    systemctl stop lab-bait.service 2>/dev/null || true
    swapoff /root/swap 2>/dev/null || true
    sysctl --quiet --write vm.swappiness=60
    rm -f /root/swap /root/swapped /root/bait.key
}

# reclaim GROUP: takes from the control group what the kernel can; that it is less than what was asked for is no news.
reclaim() {
    echo 64M 2>/dev/null >"/sys/fs/cgroup/system.slice/$1/memory.reclaim" || true
}

is_swapped_out() {
    awk '/^VmSwap:/ { exit !($2 > 8192) }' "/proc/$1/status"
}

# swap_content: as it is on the disk, not as the file was read before.
swap_content() {
    sync
    dd if=/root/swap bs=1M iflag=direct status=none
}

# Core dumps of the kernel's own kind, at a place where the daemon could write; even with a limit that root
# has lifted meanwhile.
case_the_daemon_leaves_no_core_dump() {
    local pid
    mkdir -p /var/tmp/cores
    chmod 1777 /var/tmp/cores
    sysctl --quiet --write kernel.core_pattern=/var/tmp/cores/core.%e.%p
    (ulimit -c unlimited && exec sleep 600) &
    wait_until 10 grep -qx sleep "/proc/$!/comm"
    kill -SEGV $!
    wait_until 20 compgen -G '/var/tmp/cores/core.sleep.*'

    pid=$(daemon_pid)
    prlimit --pid "$pid" --core=unlimited:unlimited
    # Rust's run-time catches the first SIGSEGV that is sent; it takes a signal that nobody catches.
    kill -ABRT "$pid"
    wait_until 60 daemon_is_another "$pid"
    expect_eq "$(compgen -G '/var/tmp/cores/core.*' | grep -v core.sleep || true)" '' 'core dumps'
    expect_contains "$(journalctl --unit volcryptd --no-pager --quiet --since "@$(cat /root/since)")" \
        'status=6/ABRT' journal
    sysctl --quiet --write kernel.core_pattern=core
    rm -r /var/tmp/cores

    # The guest goes on with the next daemon.
    qemu_io vm sdb 'read -P 0xab 0 64k'
    disk_detach vm sdb
    nothing_left
    disk_attach vm "$(lun_path prot-secret)" sdb
    qemu_io vm sdb 'read -P 0xab 0 64k'
    [ "$(status_kb VmLck)" -gt 0 ] || fail 'the next daemon locks no memory'
}

# The usual key manager: the key is made by the daemon, and comes out on the operator's demand only, past the
# command that asks for it.
case_a_key_of_the_database_is_in_no_file_of_it() {
    domain_destroy vm
    domain_undefine vm
    protect
    volume_create wrapped 16
    rm -f /root/wrapped.key
    strace -f -xx -s 1000000 -e trace=sendmsg,recvmsg,sendto,recvfrom,read,write,writev -o "$traces/export" \
        volcrypt volume export-key prot-wrapped-0 --to /root/wrapped.key
    key=/root/wrapped.key
    expect_eq "$(stat -c '%a %s' "$key")" '600 64' 'exported key'
    expect_eq "$(key_in /root/wrapped.key)" /root/wrapped.key 'search for the exported key'
    decode "$traces/export" | grep -q '{"export-key":' || fail 'the request is not in the trace'
    mapfile -t files < <(find /var/lib/volcrypt -type f)
    expect_no_key 'a file of the daemon' "${files[@]}"
    expect_no_key 'what the command said and heard' "$traces/export"
    journalctl --no-pager --quiet --output export --since "@$(cat /root/since)" >/root/journal
    expect_no_key 'a log' /root/journal
}

case_the_daemon_is_as_before() {
    rm -rf "$drop_in" "$traces" /root/*.key "$key"
    systemctl daemon-reload
    protect
}

# status_kb NAME: of the daemon's /proc/PID/status.
status_kb() {
    sed -n "s/^$1:[[:space:]]*\([0-9]*\) kB/\1/p" "/proc/$(daemon_pid)/status"
}

daemon_is_another() {
    [ "$(systemctl is-active volcryptd)" = active ] && [ "$(daemon_pid)" != "$1" ]
}

as_qemu() {
    setpriv --reuid libvirt-qemu --regid kvm --clear-groups "$@"
}

# decode FILE: what strace -xx wrote, as text.
decode() {
    python3 -c 'import re, sys
sys.stdout.buffer.write(re.sub(rb"\\x([0-9a-f]{2})", lambda found: bytes.fromhex(found[1].decode()),
                               open(sys.argv[1], "rb").read()))' "$1"
}

# blank_loop: a loop device, for a mapping that is none of volcrypt's.
blank_loop() {
    truncate --size 1M /root/blank
    losetup --find --show /root/blank
}

# lun_loop: a loop device of what stands on the storage server.
lun_loop() {
    losetup --find --show --read-only "$(lun_backing prot-secret)"
}
