//! The hook, as libvirt runs it before a domain starts, for domains without protected disks.

use std::fmt::Write;
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::PathBuf;
use std::time::Duration;

use crate::Outcome;
use crate::daemon::Daemon;
use crate::measure::{medians, of_program};
use crate::table::{Aim, Figure};

const ROUNDS: usize = 101;
const AIM: Duration = Duration::from_millis(3);
const DOMAIN: &str = "instance-00000001";

/// The least that a hook in another language could do.
const PYTHON_HOOK: &str = "#!/usr/bin/python3\nimport sys\nsys.stdin.read()\n";

/// Hooks for domains of several sizes against a program that does nothing.
pub fn figures(daemon: &Daemon) -> Outcome<Vec<Figure>> {
    let hook = env!("CARGO_BIN_EXE_volcrypt-hook");
    let python_hook = daemon.folder().join("hook.py");
    fs::write(&python_hook, PYTHON_HOOK)?;
    fs::set_permissions(&python_hook, fs::Permissions::from_mode(0o755))?;

    let image = daemon.folder().join("image");
    fs::write(&image, "")?;
    let files = vec![image];
    let devices = block_devices()?;
    let kinds = format!("block devices ({} different)", devices.len());
    let cases = [
        ("hook, no disk".to_owned(), domain(0, &files), Aim::None),
        (format!("hook, 1 disk, {kinds}"), domain(1, &devices), Aim::None),
        (format!("hook, 26 disks, {kinds}"), domain(26, &devices), Aim::Over(AIM)),
        ("hook, 26 disks, image files".to_owned(), domain(26, &files), Aim::Over(AIM)),
        (format!("hook, 1,000 disks, {kinds}"), domain(1000, &devices), Aim::None),
    ];

    let arguments = [DOMAIN, "prepare", "begin", "-"];
    let few = &cases[2].1;
    let mut runs = vec![of_program("/bin/true", &[], few), of_program(&python_hook, &arguments, few)];
    runs.extend(cases.iter().map(|(_, xml, _)| of_program(hook, &arguments, xml)));
    let medians = medians(ROUNDS, &mut runs)?;
    drop(runs);

    let against_nothing = |what, value, aim| Figure { what, value, compared: ("/bin/true".into(), medians[0]), aim };
    let mut figures: Vec<Figure> = Vec::new();
    let python = "Python hook that only reads, 26 disks".to_owned();
    figures.push(against_nothing(python, medians[1], Aim::None));
    figures
        .extend(cases.into_iter().zip(&medians[2..]).map(|((what, _, aim), &value)| against_nothing(what, value, aim)));
    Ok(figures)
}

/// The nodes of this host's block devices.
fn block_devices() -> Outcome<Vec<PathBuf>> {
    let mut nodes = Vec::new();
    for device in fs::read_dir("/sys/class/block")? {
        let node = PathBuf::from("/dev").join(device?.file_name());
        if fs::metadata(&node).is_ok_and(|metadata| metadata.file_type().is_block_device()) {
            nodes.push(node);
        }
    }
    nodes.sort();
    match nodes.is_empty() {
        true => Err("there is no block device in /dev".into()),
        false => Ok(nodes),
    }
}

/// The XML of a domain with `count` disks, in turn on `sources`, as Nova and libvirt write it.
pub fn domain(count: usize, sources: &[PathBuf]) -> String {
    let mut disks = String::new();
    for (number, source) in sources.iter().cycle().take(count).enumerate() {
        let (kind, attribute) = match source.starts_with("/dev") {
            true => ("block", "dev"),
            false => ("file", "file"),
        };
        let _ = write!(
            disks,
            "    <disk type='{kind}' device='disk'>
      <driver name='qemu' type='raw' cache='none' io='native' discard='unmap'/>
      <source {attribute}='{}'/>
      <target dev='sd{number}' bus='scsi'/>
      <serial>0b1f7c1e-1111-4222-8333-{number:012x}</serial>
      <address type='drive' controller='0' bus='0' target='0' unit='{number}'/>
    </disk>
",
            source.display()
        );
    }
    format!(
        "<domain type='kvm'>
  <name>{DOMAIN}</name>
  <uuid>0b1f7c1e-1111-4222-8333-444455556666</uuid>
  <metadata>
    <nova:instance xmlns:nova='http://openstack.org/xmlns/libvirt/nova/1.1'>
      <nova:name>figures</nova:name>
      <nova:owner>
        <nova:user uuid='8d2c1b0a9f8e7d6c5b4a392817060504'>figures</nova:user>
        <nova:project uuid='0123456789abcdef0123456789abcdef'>figures</nova:project>
      </nova:owner>
    </nova:instance>
  </metadata>
  <memory unit='KiB'>4194304</memory>
  <vcpu placement='static'>2</vcpu>
  <os><type arch='x86_64' machine='pc-q35-7.2'>hvm</type></os>
  <devices>
    <emulator>/usr/libexec/volcrypt/emulators/qemu-system-x86_64</emulator>
{disks}    <controller type='scsi' index='0' model='virtio-scsi'/>
    <memballoon model='virtio'/>
  </devices>
</domain>
"
    )
}
