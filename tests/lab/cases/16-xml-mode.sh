# shellcheck shell=bash
# shellcheck disable=SC2154 # The helpers that are sourced first assign what is not assigned here.
# intercept = "xml": guests without the wrapper, which open their mappings by name.
# LUNs of prot-xml: 0 to 3, all enrolled. Target `free` is not protected. Domain `named` runs without the wrapper; its
# definition names the mapping of LUN 0 as sda, and `free` as sdb.
# machine: second
# takes: 970

by_xml_emulator=/usr/bin/qemu-system-x86_64

# by_xml [LINE...]: further lines go into the section [hook] and what follows on it.
by_xml() {
    protect '[hook]' 'intercept = "xml"' "$@"
}

# without_wrapper NAME: has the domain run QEMU itself.
without_wrapper() {
    virsh --quiet dumpxml "$1" --inactive | sed "s,<emulator>.*<,<emulator>$by_xml_emulator<," >/run/lab-xml.emulator
    virsh --quiet define /run/lab-xml.emulator >/dev/null
}

# set_up: the domain is defined, with its disks' own devices; its definition is kept in /run/lab-xml.before.
set_up() {
    by_xml
    volume_create xml 8 4
    target_create free 8
    target_login free
    domain_define named <(disk_xml "$(lun_path prot-xml 0)" sda serial-0) <(disk_xml "$(lun_path free)" sdb)
    without_wrapper named
    virsh dumpxml --inactive named >/run/lab-xml.before
}

# ready: the domain is rewritten and runs.
ready() {
    if [ ! -d "$lab_store/prot-xml" ]; then
        set_up
        volcrypt domain rewrite named >/dev/null
        domain_start named
        works named sda 0 ab
    fi
    [ "$(virsh --quiet domstate named)" = running ] || domain_start named
}

# attach NAME LUN TARGET [OPTION...], detach NAME LUN TARGET [OPTION...]: with the XML that virsh would be given.
attach() {
    disk_xml "$(lun_path prot-xml "$2")" "$3" >/run/lab-xml.disk
    volcrypt attach-device "$1" /run/lab-xml.disk "${@:4}"
}

detach() {
    disk_xml "$(lun_path prot-xml "$2")" "$3" >/run/lab-xml.disk
    volcrypt detach-device "$1" /run/lab-xml.disk "${@:4}"
}

mapped() {
    mappings | grep -qx "volcrypt-prot-xml-$1"
}

unmapped() {
    ! mapped "$1"
}

# mapping_status LUN FILTER: of the mapping's part of the status.
mapping_status() {
    volcrypt status --json | jq --compact-output ".mappings[] | select(.volume == \"prot-xml-$1\") | $2"
}

# works NAME TARGET LUN BYTE: writes through QEMU, and what is on the LUN is ciphertext.
works() {
    qemu_io "$1" "$2" "write -P 0x$4 0 64k" >/dev/null
    qemu_io "$1" "$2" flush >/dev/null
    qemu_io "$1" "$2" "read -P 0x$4 0 64k" >/dev/null
    expect_ciphertext xml "$3" "$4"
}

sum_of() {
    sync
    sha256sum <"$(lun_backing "$@")"
}

case_a_rewritten_domain_runs_without_the_wrapper() {
    set_up
    expect_fails domain_start named
    expect_contains "$OUTPUT" "$(lun_path prot-xml 0) is the protected volume prot-xml-0" 'virsh start'
    expect_contains "$OUTPUT" "run 'volcrypt domain rewrite named'" 'virsh start'
    nothing_left

    expect_contains "$(volcrypt domain rewrite named)" 'from its next start on: sda (volume prot-xml-0).'
    expect_contains "$(volcrypt domain rewrite named)" 'it stays as it is'
    domain_start named
    expect_mapped prot-xml-0
    expect_eq "$(tr '\0' ' ' <"/proc/$(domain_pid named)/cmdline" | cut -d ' ' -f 1)" "$by_xml_emulator" 'the emulator'
    expect_eq "$(volcrypt status --json | jq '.guests | length')" 0 'guests with the wrapper'
    works named sda 0 ab
    qemu_io named sdb 'write -P 0xab 0 4k' >/dev/null
    # Only QEMU has it open by now.
    expect_eq "$(mapping_status 0 '[.domains, .held_for]')" '[["named"],[]]'
    expect_contains "$(volcrypt status)" "Guests get to their mappings by the domain's XML."
    volcrypt audit show --volume prot-xml-0 --kind key-used --json |
        jq --exit-status 'any(.[]; .domain == "named" and .detail == "mapped for disk sda")' >/dev/null ||
        fail 'the use of the key is not recorded'
    volcrypt doctor || fail 'the doctor is not content'
}

case_a_disk_is_attached_and_detached() {
    ready
    expect_contains "$(attach named 1 sdc)" 'Attached to domain named, on the mapping of volume prot-xml-1.'
    expect_contains "$(virsh dumpxml named)" /dev/mapper/volcrypt-prot-xml-1
    works named sdc 1 cd
    expect_eq "$(mapping_status 1 '[.domains, .held_for]')" '[["named"],[]]'
    expect_contains "$(detach named 1 sdc)" 'The mapping of volume prot-xml-1 is gone.'
    unmapped 1 || fail 'the mapping is left'
    expect_mapped prot-xml-0

    # By the XML as libvirt has it, from standard input, and by id and UUID.
    attach "$(virsh domid named | tr -d '\n')" 1 sdc --live >/dev/null
    qemu_io named sdc 'read -P 0xcd 0 64k' >/dev/null
    disk_xml /dev/mapper/volcrypt-prot-xml-1 sdc |
        volcrypt detach-device "$(virsh domuuid named | tr -d '\n')" /dev/stdin --current >/dev/null
    wait_until 20 unmapped 1
    # No volume of ours.
    disk_xml "$(lun_path free)" sdd >/run/lab-xml.disk
    sed -i "s,$(lun_path free),/dev/null,; s/type='block'/type='file'/; s/dev='.dev.null'/file='\/var\/tmp\/lab-xml.img'/" /run/lab-xml.disk
    truncate --size 1M /var/tmp/lab-xml.img
    volcrypt attach-device named /run/lab-xml.disk
    volcrypt detach-device named /run/lab-xml.disk
    rm /var/tmp/lab-xml.img
}

# udev takes the name of the mapping away and gives it to the next one; none of that may come in between.
case_the_same_volume_comes_and_goes() {
    local count
    ready
    for ((count = 0; count < 8; count++)); do
        attach named 1 sdc >/dev/null
        detach named 1 sdc >/dev/null
    done
    wait_until 20 unmapped 1
}

case_the_next_number_is_another_devices() {
    local major minor next
    ready
    attach named 1 sdc >/dev/null
    read -r major minor < <(dmsetup info --columns --noheadings --separator ' ' --options major,minor volcrypt-prot-xml-1)
    detach named 1 sdc >/dev/null
    for next in 1 2 3; do
        dmsetup create "lab-taken-$next" --notable --major "$major" --minor "$((minor + next))"
    done
    attach named 1 sdc >/dev/null
    works named sdc 1 ce
    detach named 1 sdc >/dev/null
    wait_until 20 unmapped 1
    for next in 1 2 3; do
        dmsetup remove --retry "lab-taken-$next"
    done
}

case_past_volcrypt_nothing_is_written_in_clear() {
    local before
    ready
    before=$(sum_of prot-xml 2)
    expect_fails disk_attach named "$(lun_path prot-xml 2)" sdc
    expect_contains "$OUTPUT" 'Operation not permitted' 'virsh attach-device'
    domain_define raw <(disk_xml "$(lun_path prot-xml 2)" sda)
    without_wrapper raw
    expect_fails domain_start raw
    expect_contains "$OUTPUT" "run 'volcrypt domain rewrite raw'" 'virsh start'
    domain_undefine raw
    unmapped 2 || fail 'there is a mapping'
    expect_eq "$(sum_of prot-xml 2)" "$before" 'the LUN'
}

case_a_volume_whose_rule_is_lost_stays_shut() {
    local before how
    ready
    before=$(sum_of prot-xml 2)
    sed -i 's/:(?<id>prot-/:(?<id>lost-/' "$volcrypt_config"
    for how in reload 'systemctl restart volcryptd'; do
        $how
        expect_fails disk_attach named "$(lun_path prot-xml 2)" sdc
        expect_contains "$OUTPUT" 'Operation not permitted' "virsh attach-device after a $how"
    done
    sed -i 's/:(?<id>lost-/:(?<id>prot-/' "$volcrypt_config"
    reload
    expect_eq "$(sum_of prot-xml 2)" "$before" 'the LUN'
    attach named 2 sdc >/dev/null
    detach named 2 sdc >/dev/null
}

case_what_libvirt_refuses_leaves_nothing() {
    ready
    expect_fails attach named 2 sda
    expect_eq "$CODE" 1 'the exit code'
    expect_contains "$OUTPUT" 'libvirt says: '
    unmapped 2 || fail 'the mapping is left'
    expect_fails attach named 0 sdc
    expect_contains "$OUTPUT" 'domain named has volume prot-xml-0 already, as disk sda'
    expect_fails attach nobody 2 sdc
    expect_eq "$CODE" 1 'the exit code'
    expect_contains "$OUTPUT" 'there is no domain nobody'
    expect_fails attach named 2 sdc --live --current
    expect_eq "$CODE" 1 'the exit code'
    expect_fails detach named 2 sdx
    expect_eq "$CODE" 1 'the exit code'
    volcrypt volume set-owner prot-xml-2 p1 >/dev/null
    expect_fails attach named 2 sdc
    expect_contains "$OUTPUT" 'volume prot-xml-2 belongs to "p1" and domain named to nobody'
    volcrypt volume set-owner prot-xml-2 >/dev/null
    expect_eq "$(mappings)" volcrypt-prot-xml-0 mappings
}

# The guest's QEMU is stopped, so libvirt waits for it with the mapping made.
case_a_command_that_is_killed_leaves_nothing() {
    local command
    ready
    kill -STOP "$(domain_pid named)"
    attach named 2 sdc &
    command=$!
    wait_until 30 mapped 2
    expect_eq "$(mapping_status 2 .held_for)" '["named"]'
    expect_contains "$(volcrypt status)" 'named (held)'
    expect_fails volcrypt volume retire prot-xml-2
    expect_contains "$OUTPUT" 'is in use on this host'
    pkill --signal KILL --parent "$command" || true
    kill -KILL "$command" || true
    wait "$command" || true
    wait_until 10 unmapped 2
    kill -CONT "$(domain_pid named)"
    wait_until 60 virsh --quiet domblkinfo named sda
    [[ $(virsh --quiet domblklist named) != *sdc* ]] || fail 'the disk is there'
    works named sda 0 ab
    attach named 2 sdc >/dev/null
    works named sdc 2 ef
    detach named 2 sdc >/dev/null
}

case_a_guest_that_ends_takes_its_mappings_along() {
    ready
    attach named 1 sdc >/dev/null
    kill -KILL "$(domain_pid named)"
    nothing_left
    wait_until 30 test ! -e /run/libvirt/qemu/named.pid
    domain_start named
    attach named 1 sdc >/dev/null
    domain_destroy named
    nothing_left

    domain_start named
    virsh --quiet managedsave named
    nothing_left
    domain_start named
    qemu_io named sda 'read -P 0xab 0 64k' >/dev/null
    expect_eq "$(mapping_status 0 '[.domains, .held_for]')" '[["named"],[]]'
}

case_the_daemon_may_be_restarted() {
    ready
    attach named 1 sdc >/dev/null
    systemctl restart volcryptd
    qemu_io named sda 'read -P 0xab 0 64k' >/dev/null
    works named sdc 1 cd
    expect_eq "$(mapping_status 1 .domains)" '["named"]'
    detach named 1 sdc >/dev/null
    attach named 1 sdc >/dev/null
    detach named 1 sdc >/dev/null
    wait_until 20 unmapped 1
}

case_a_restart_waits_for_who_is_about_to_open_a_mapping() {
    local daemon
    ready
    daemon=$(systemctl show --property MainPID --value volcryptd)
    disk_xml "$(lun_path prot-xml 1)" sdc | volcrypt hold named >/run/lab-xml.held
    systemctl restart --no-block volcryptd
    wait_until 20 ends
    virsh --quiet attach-device named /run/lab-xml.held --live
    expect_eq "$(systemctl show --property MainPID --value volcryptd)" "$daemon" 'the daemon'
    volcrypt hold --release named </run/lab-xml.held
    wait_until 10 systemctl --quiet is-active volcryptd
    works named sdc 1 cd
    detach named 1 sdc >/dev/null
    wait_until 20 unmapped 1
}

ends() {
    [ "$(systemctl show --property ActiveState --value volcryptd)" = deactivating ]
}

case_a_persistent_disk_is_there_at_the_next_start() {
    ready
    attach named 3 sdc --persistent >/dev/null
    attach named 1 sdd --config >/dev/null
    unmapped 1 || fail 'the running domain got it'
    works named sdc 3 ef
    domain_destroy named
    nothing_left
    domain_start named
    expect_eq "$(mappings | sort | tr '\n' ' ')" 'volcrypt-prot-xml-0 volcrypt-prot-xml-1 volcrypt-prot-xml-3 '
    qemu_io named sdc 'read -P 0xef 0 64k' >/dev/null
    works named sdd 1 cd
    detach named 1 sdd --persistent >/dev/null
    wait_until 20 unmapped 1
    detach named 3 sdc --live >/dev/null
    wait_until 20 unmapped 3
    expect_contains "$(volcrypt domain unrewrite named)" 'Disk sdc (volume prot-xml-3) stays on its mapping'
    detach named 3 sdc --config >/dev/null
    diff <(virsh dumpxml --inactive named) /run/lab-xml.before
    volcrypt domain rewrite named >/dev/null
    domain_destroy named
    nothing_left
}

# vdsm_calls EVENT: as oVirt's vdsm does, for the domain with the UUID $vdsm_machine.
vdsm_calls() {
    # Packages bring no documentation into this machine.
    install -D -m 755 /lab/files/hooks/vdsm/50_volcrypt "/run/lab-xml.vdsm/$1/50_volcrypt"
    _hook_domxml=/run/lab-xml.xml vmId=$vdsm_machine "/run/lab-xml.vdsm/$1/50_volcrypt"
}

case_vdsm_starts_a_machine_and_plugs_a_disk() {
    local vdsm_machine
    ready
    vdsm_machine=$(virsh domuuid named | tr -d '\n')
    disk_xml "$(lun_path prot-xml 1)" sdc >/run/lab-xml.xml
    vdsm_calls before_disk_hotplug
    expect_contains "$(cat /run/lab-xml.xml)" "<source dev='/dev/mapper/volcrypt-prot-xml-1'/>"
    expect_eq "$(mapping_status 1 .held_for)" '["named"]'
    virsh --quiet attach-device named /run/lab-xml.xml --live
    vdsm_calls after_disk_hotplug
    expect_eq "$(mapping_status 1 '[.domains, .held_for]')" '[["named"],[]]'
    works named sdc 1 cd
    virsh --quiet detach-device named /run/lab-xml.xml --live
    vdsm_calls after_disk_hotunplug
    wait_until 10 unmapped 1

    # What was never plugged is let go as well.
    disk_xml "$(lun_path prot-xml 1)" sdc >/run/lab-xml.xml
    vdsm_calls before_disk_hotplug
    vdsm_calls after_disk_hotunplug
    wait_until 10 unmapped 1
    disk_xml "$(lun_path prot-xml 1)" sdc | sed "s/device='disk'/device='lun'/" >/run/lab-xml.xml
    expect_fails vdsm_calls before_disk_hotplug
    expect_eq "$CODE" 2 'the exit code'
    expect_contains "$OUTPUT" 'passes SCSI commands around its encryption'

    domain_destroy named
    domain_undefine named
    cp /run/lab-xml.before /run/lab-xml.xml
    vdsm_calls before_vm_start
    virsh --quiet create /run/lab-xml.xml
    qemu_io named sda 'read -P 0xab 0 64k' >/dev/null
    expect_fails volcrypt domain rewrite named
    expect_contains "$OUTPUT" 'domain named is transient'
    domain_destroy named
    nothing_left
    virsh --quiet define /run/lab-xml.before
    volcrypt domain rewrite named >/dev/null
}

case_a_shared_volume_stays_for_the_other_domain() {
    local disk
    ready
    disk=$(disk_xml /dev/mapper/volcrypt-prot-xml-3 sda | sed 's,</disk>,<shareable/></disk>,')
    domain_define left <(echo "$disk")
    domain_define right <(echo "$disk")
    without_wrapper left
    without_wrapper right
    domain_start left
    domain_start right
    works left sda 3 ef
    expect_eq "$(mapping_status 3 '.domains | sort')" '["left","right"]'
    domain_destroy left
    qemu_io right sda 'read -P 0xef 0 64k' >/dev/null
    domain_destroy right
    wait_until 20 unmapped 3
    domain_undefine left
    domain_undefine right
}

case_a_volume_that_is_not_there_is_named() {
    ready
    domain_destroy named
    nothing_left
    target_logout prot-xml
    expect_fails domain_start named
    expect_contains "$OUTPUT" "disk sda: no block device of this host is protected as volume prot-xml-0 for domain named"
    expect_contains "$OUTPUT" "log in to its target $lab_iqn:prot-xml"
    target_login prot-xml
    domain_start named
    qemu_io named sda 'read -P 0xab 0 64k' >/dev/null
}

case_without_the_guard_nothing_starts() {
    ready
    domain_destroy named
    by_xml '[guard]' 'enabled = false'
    expect_fails domain_start named
    expect_contains "$OUTPUT" 'the guard alone keeps domain named from the raw devices of protected volumes, and it is off'
    expect_fails volcrypt doctor
    expect_contains "$OUTPUT" 'FAIL  guard: it is off, and with intercept = "xml" nothing else keeps guests'
    nothing_left
    by_xml
    ready
    qemu_io named sda 'read -P 0xab 0 64k' >/dev/null
}

case_a_host_goes_back_to_the_wrapper() {
    ready
    domain_destroy named
    protect
    expect_fails volcrypt domain rewrite named
    expect_contains "$OUTPUT" 'with intercept = "open" nothing makes the mappings that domain named would name'
    expect_contains "$(volcrypt domain unrewrite named)" 'from its next start on: sda.'
    diff <(virsh dumpxml --inactive named) /run/lab-xml.before
    volcrypt domain adopt named >/dev/null
    domain_start named
    qemu_io named sda 'read -P 0xab 0 64k' >/dev/null
    attach named 1 sdc >/dev/null
    expect_contains "$(virsh dumpxml named)" "$(lun_path prot-xml 1)"
    works named sdc 1 cd
    expect_contains "$(detach named 1 sdc)" 'Detached from domain named.'
    wait_until 20 unmapped 1
    lab_reset
    nothing_left
}
