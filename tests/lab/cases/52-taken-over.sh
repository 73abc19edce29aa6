# shellcheck shell=bash
# Somebody has taken over the QEMU of domain mine: he exchanges what he opens while it is looked at, and keeps what he
# once got. `attack` runs as that QEMU does: as its user, in its control group and with its /dev, and the daemon finds
# it in libvirt's own files as mine. It has more than that: AppArmor does not confine it, it is of the group disk, and
# in its /dev is a node of the other domain's LUN for that group.
# LUNs of prot-taken: 0 is mine's, 1 is theirs'.
# machine: second
# takes: 320

emulators=/run/lab-emulators
folder=/var/tmp/lab-attack

case_two_domains_of_which_one_is_taken_over() {
    protect
    volume_create taken 16 2
    domain_define mine <(disk_xml "$(lun_path prot-taken 0)" sda)
    domain_define theirs <(disk_xml "$(lun_path prot-taken 1)" sda)
    domain_start mine
    domain_start theirs
    add_node_of_theirs
    install -m 755 /lab/files/guest/attack /usr/bin/qemu-system-attack
    mkdir -p "$emulators"
    ln -s /usr/libexec/volcrypt/volcrypt-qemu "$emulators/qemu-system-attack"
}

# An attack that could not tell what it got would prove nothing.
case_on_the_host_root_gets_what_the_attack_is_after() {
    local how
    for how in memory link directory descriptor; do
        prepare_folder
        TALLY=$(attack "$how" 100 "$folder" "$folder/harmless" "$(lun_device prot-taken 0)" \
            "$(lun_device prot-taken 1)")
        echo "$how: $TALLY"
        expect_eq "$(devices_got)" "$({
            block "$(lun_device prot-taken 0)"
            block "$(lun_device prot-taken 1)"
        } | sort)" "$how"
    done
}

case_an_exchanged_path_leads_to_its_own_mapping_or_nowhere() {
    local how
    for how in memory link directory descriptor; do
        prepare_folder
        TALLY=$(as_mine "$emulators/qemu-system-attack" "$how" 300 "$folder" "$folder/harmless" \
            "$(lun_device prot-taken 0)" "$(lun_device prot-taken 1)")
        echo "$how: $TALLY"
        # All three were asked for: what is not protected is let through, and the other domain's volume refused.
        [ "$(count other)" -gt 0 ] || fail "$how: the harmless file was never opened"
        [ "$(count 'errno 13')" -gt 0 ] || fail "$how: nothing was refused"
        expect_eq "$(devices_got)" "$(block "$(mapping_device prot-taken-0)")" "$how"
    done
    nothing_gained
}

case_who_keeps_the_listener_of_a_dead_qemu_gets_nothing() {
    local pid child
    prepare_folder
    mkfifo "$folder/asks"
    as_mine "$emulators/qemu-system-attack" keep "$folder" "$(lun_device prot-taken 0)" "$(lun_device prot-taken 1)" \
        <"$folder/asks" >"$folder/answers" &
    exec 9>"$folder/asks"
    pid=$!
    # It stops itself once it has its child.
    wait_until 60 grep -q '^State:.T' "/proc/$pid/status"
    child=$(pgrep --parent "$pid")
    # The QEMU lives, and what it has started is not it.
    expect_refused_to_child
    # It has ended, and its listener is served for the sake of its child.
    kill -KILL "$pid"
    wait "$pid" || true
    is_registered "$pid" || fail 'the listener has ended with the process that registered it'
    expect_refused_to_child
    # The domain is stopped. The child has got out of the domain's control group, or libvirt would kill it.
    echo "$child" >/sys/fs/cgroup/cgroup.procs
    domain_destroy mine
    wait_until 20 mine_is_not_mapped
    expect_refused_to_child
    mine_is_not_mapped || fail 'the volume was mapped for a domain that is stopped'
    # It runs again, with the same volume.
    domain_start mine
    expect_mapped prot-taken-0
    expect_refused_to_child
    is_registered "$pid" || fail 'the listener is not registered any more'
    exec 9>&-
    wait_until 20 test ! -e "/proc/$child"
    nothing_gained
}

# expect_refused_to_child: the process that keeps the listener asks for both volumes.
expect_refused_to_child() {
    local lines
    lines=$(wc -l <"$folder/answers")
    echo >&9
    wait_until 60 has_more_lines "$folder/answers" "$lines"
    expect_eq "$(tail -n 1 "$folder/answers")" '{"errno 13": 2}' 'the answer to the one who keeps the listener'
}

has_more_lines() {
    [ "$(wc -l <"$1")" -gt "$2" ]
}

is_registered() {
    volcrypt status --json | jq --exit-status ".guests[] | select(.pid == $1)" >/dev/null
}

mine_is_not_mapped() {
    ! mappings | grep -qx volcrypt-prot-taken-0
}

# Whoever installs the filter himself may keep the listener as well, answer his own opens, and take away those that the
# daemon is about to receive. It makes him no richer, and others wait for nothing.
case_who_answers_his_own_opens_gets_nothing() {
    prepare_folder
    add_node_of_theirs
    mkfifo "$folder/end"
    as_mine qemu-system-attack steal 100 "$folder" "$(lun_device prot-taken 0)" "$(lun_device prot-taken 1)" \
        <"$folder/end" >"$folder/answers" &
    exec 9>"$folder/end"
    wait_until 120 test -s "$folder/answers"
    TALLY=$(cat "$folder/answers")
    echo "steal: $TALLY"
    [ "$(count stolen)" -gt 0 ] || fail 'the daemon was always quicker'
    [ "$(count 'errno 1')" -gt 0 ] || fail 'the guard was never asked'
    [[ $(devices_got) =~ ^("$(block "$(mapping_device prot-taken-0)")")?$ ]] || fail "he has got $(devices_got)"
    # While he is still there.
    qemu_io theirs sda 'read 0 64k'
    domain_define other
    domain_start other
    domain_destroy other
    domain_undefine other
    exec 9>&-
    wait
    nothing_gained
}

case_the_domains_end() {
    lab_reset
    rm -rf "$emulators" "$folder" /usr/bin/qemu-system-attack /run/libvirt/qemu/attack.*
    nothing_left
}

# as_mine COMMAND...: as the QEMU of domain mine. The entry that libvirt made of that one is joined by another of its
# kind, so that the daemon takes this process for mine as well.
as_mine() {
    local group
    group=/sys/fs/cgroup$(sed 's/^0:://' "/proc/$(domain_pid mine)/cgroup")
    # shellcheck disable=SC2016 # For the shell that becomes the process.
    exec bash -c 'set -e
        echo $$ >"$1/cgroup.procs"
        echo $$ >/run/libvirt/qemu/attack.pid
        sed "1,/<domstatus/s/ pid=.[0-9]*./ pid=\"$$\"/" /run/libvirt/qemu/mine.xml >/run/libvirt/qemu/attack.xml
        exec nsenter --target "$2" --mount setpriv --reuid libvirt-qemu --regid kvm --groups kvm,disk "${@:3}"' \
        bash "$group" "$(domain_pid mine)" "$@"
}

# add_node_of_theirs: into the /dev of mine.
add_node_of_theirs() {
    local device
    device=$(lun_device prot-taken 1)
    # shellcheck disable=SC2016 # For the shell in there.
    nsenter --target "$(domain_pid mine)" --mount sh -c '[ -b "$1" ] || {
            mknod --mode 660 "$@" && chgrp disk "$1"
        }' sh "$device" b "$((0x$(stat -c %t "$device")))" "$((0x$(stat -c %T "$device")))"
}

# attack ARGUMENT...: as root on the host, without the wrapper.
attack() {
    /lab/files/guest/attack "$@"
}

# prepare_folder: where the attack may write, with a file that it may open.
prepare_folder() {
    rm -rf "$folder"
    mkdir "$folder"
    echo >"$folder/harmless"
    chown -R libvirt-qemu "$folder"
}

# count WHAT: how often that came of an open.
count() {
    jq --arg what "$1" '.[$what] // 0' <<<"$TALLY"
}

# devices_got: the devices of which he has got a descriptor.
devices_got() {
    jq --raw-output 'keys[] | select(test("^(block|character) "))' <<<"$TALLY" | sort
}

# block PATH: the device there, as `attack` writes it.
block() {
    stat --dereference --format 'block %Hr:%Lr' "$1"
}

# nothing_gained: the mappings are those of the two domains, each open once.
nothing_gained() {
    wait_until 20 two_mappings
}

two_mappings() {
    [ "$(volcrypt status --json | jq -c '[.mappings[] | [.volume, .open_count] + .domains] | sort')" = \
        '[["prot-taken-0",1,"mine"],["prot-taken-1",1,"theirs"]]' ]
}
