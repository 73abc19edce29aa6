# shellcheck shell=bash
# `volcrypt rewrite`, with what this machine's libvirt prints and takes.
# LUNs of prot-paper: 0 and 1 are enrolled. The target plain is not protected.
# machine: second
# takes: 90

image=/var/tmp/lab-paper.img

case_a_definition_goes_there_and_back() {
    local folder
    folder=$(mktemp -d)
    protect
    volume_create paper 8 2
    target_create plain 8
    target_login plain
    truncate -s 8M "$image"
    domain_define paper <(disk_xml "$(lun_path prot-paper 0)" sda serial-0) <(disk_xml "$(lun_path plain)" sdb) <(
        echo "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='$image'/>"
        echo "<target dev='sdc' bus='scsi'/></disk>"
    ) <(disk_xml "$(lun_device prot-paper 1)" sdd)
    virsh dumpxml --inactive paper >"$folder/before"
    volcrypt rewrite <"$folder/before" >"$folder/rewritten"
    expect_eq "$(grep -c '/dev/mapper/volcrypt-prot-paper-[01]' "$folder/rewritten")" 2 'disks on mappings'
    expect_contains "$(cat "$folder/rewritten")" "$(lun_path plain)" 'the rewritten definition'
    volcrypt rewrite --reverse <"$folder/rewritten" >"$folder/back"
    cmp "$folder/back" "$folder/before"
    no_mapping || fail 'a mapping was made'

    virsh --quiet define "$folder/rewritten" >/dev/null
    virsh dumpxml --inactive paper >"$folder/defined"
    expect_eq "$(grep -c '/dev/mapper/volcrypt-prot-paper-[01]' "$folder/defined")" 2 'disks on mappings, as libvirt has it'
    volcrypt rewrite <"$folder/defined" >"$folder/again"
    cmp "$folder/again" "$folder/defined"
    volcrypt rewrite --reverse <"$folder/defined" >"$folder/back"
    virsh --quiet define "$folder/back" >/dev/null
    diff <(virsh dumpxml --inactive paper) "$folder/before"
    rm -r "$folder"
}

case_a_running_domain_is_rewritten_on_paper_only() {
    local before
    domain_start paper
    expect_mapped prot-paper-0
    before=$(virsh dumpxml paper)
    expect_contains "$(volcrypt rewrite <<<"$before")" /dev/mapper/volcrypt-prot-paper-1
    expect_eq "$(volcrypt rewrite <<<"$before" | volcrypt rewrite --reverse)" "$before" 'there and back'
    expect_eq "$(virsh dumpxml paper)" "$before" 'the running domain'
    domain_destroy paper
    nothing_left
}

case_what_would_get_around_a_mapping_is_refused() {
    local lone
    lone=$(disk_xml "$(lun_path prot-paper 0)" sda)
    expect_contains "$(volcrypt rewrite <<<"$lone")" "<source dev='/dev/mapper/volcrypt-prot-paper-0'/>"
    expect_fails volcrypt rewrite <<<"${lone/device=\'disk\'/device=\'lun\'}"
    expect_contains "$OUTPUT" "passes SCSI commands around its encryption"
    expect_fails volcrypt rewrite <<<"${lone%</disk>*}"
    systemctl stop volcryptd.socket volcryptd-control.socket volcryptd
    expect_fails volcrypt rewrite <<<"$lone"
    systemctl start volcryptd.socket volcryptd-control.socket volcryptd
    lab_reset
    rm "$image"
}
