//! What the guard has in the kernel: a map and a program, pinned in [`DIRECTORY`], and the program's
//! attachment to a cgroup. All of it stays when the daemon ends.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use super::book::Table;
use super::program::{Device, VERSION, instructions};
use crate::sys::bpf::{self, Map, Program};

/// Where map and program are pinned.
const DIRECTORY: &str = "/sys/fs/bpf/volcrypt";
/// Where cgroup v2 is mounted.
pub(super) const CGROUPS: &str = "/sys/fs/cgroup";
/// By this name an attached program is known as a guard, whatever its version.
const NAME: &str = "volcrypt_guard";
/// How many devices can be guarded. An entry takes memory only when it is there.
const ROOM: u32 = 1 << 16;

/// The map of guarded devices.
#[derive(Debug)]
pub struct KernelTable(Map);

impl KernelTable {
    /// The map that an earlier daemon has left, or else a new one.
    ///
    /// # Errors
    /// A sentence, when the kernel offers none.
    pub fn open() -> Result<Self, String> {
        let path = devices_pin();
        match Map::at(&path) {
            Ok(map) => Ok(KernelTable(map)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                let make = || -> io::Result<Map> {
                    fs::create_dir_all(DIRECTORY)?;
                    let map = Map::create("volcrypt_dev", ROOM)?;
                    bpf::pin(map.as_fd(), &path)?;
                    Ok(map)
                };
                make().map(KernelTable).map_err(|error| {
                    format!(
                        "{} cannot be made ({error}): run 'mount -t bpf bpf /sys/fs/bpf' if no BPF file system is mounted \
                         there, and look whether the kernel has CONFIG_CGROUP_BPF=y",
                        path.display()
                    )
                })
            }
            Err(error) => Err(format!("{0} cannot be used ({error}): remove it with 'rm {0}'", path.display())),
        }
    }
}

impl Table for KernelTable {
    fn insert(&self, device: Device) -> io::Result<()> {
        self.0.insert(&device.key())
    }

    fn remove(&self, device: Device) -> io::Result<()> {
        self.0.remove(&device.key())
    }

    fn devices(&self) -> io::Result<Vec<Device>> {
        Ok(self.0.keys()?.iter().filter_map(Device::from_key).collect())
    }
}

/// The program that looks into a map, and where it is attached.
#[derive(Debug)]
pub struct Attachment {
    cgroup: PathBuf,
    program: Program,
}

impl Attachment {
    /// Attaches the program for `table` to `cgroup`, a path below the mount point of cgroup v2, unless it
    /// is attached there.
    ///
    /// # Errors
    /// A sentence, when there is no such cgroup or the kernel refuses.
    pub fn make(table: &KernelTable, cgroup: &str) -> Result<Self, String> {
        let path = Path::new(CGROUPS).join(cgroup);
        // Without it there is nothing to guard, so nothing is made for it.
        open(&path).map_err(|error| no_cgroup(&path, &error))?;
        let program = program_for(&table.0)
            .map_err(|error| format!("the kernel does not take the guard's program ({error}): 'dmesg' may say why"))?;
        let attachment = Attachment { cgroup: path, program };
        attachment.renew()?;
        Ok(attachment)
    }

    /// Attaches the program again if it is not attached any more: the cgroup may be another one of the
    /// same name.
    ///
    /// # Errors
    /// As [`Self::make`].
    pub fn renew(&self) -> Result<(), String> {
        let cgroup = open(&self.cgroup).map_err(|error| no_cgroup(&self.cgroup, &error))?;
        let attach = || -> io::Result<()> {
            match bpf::attached(cgroup.as_fd())?.contains(&self.program.id()?) {
                true => Ok(()),
                false => bpf::attach(cgroup.as_fd(), &self.program),
            }
        };
        attach().map_err(|error| {
            format!(
                "the guard's program cannot be attached to {} ({error}): the kernel needs CONFIG_CGROUP_BPF=y and \
                 cgroup v2 there",
                self.cgroup.display()
            )
        })
    }
}

/// Takes off whatever guard is attached anywhere and is not `kept`: that of another version, and that of
/// a cgroup which was configured before. Their pins go too.
///
/// # Errors
/// Of the last step that failed; the others are done.
pub fn retire_others(kept: Option<&Attachment>) -> io::Result<()> {
    let kept_program = kept.map(|kept| Ok::<_, io::Error>((kept.cgroup.as_path(), kept.program.id()?))).transpose()?;
    let mut outcome = retire_below(Path::new(CGROUPS), kept_program);
    let kept_pins = kept.map(|_| [devices_pin(), program_pin()]);
    for entry in fs::read_dir(DIRECTORY).into_iter().flatten().flatten() {
        if !kept_pins.as_ref().is_some_and(|pins| pins.contains(&entry.path())) {
            outcome = outcome.and(fs::remove_file(entry.path()));
        }
    }
    if kept.is_none() {
        // An empty folder does no harm.
        let _ = fs::remove_dir(DIRECTORY);
    }
    outcome
}

fn retire_below(cgroup: &Path, kept: Option<(&Path, u32)>) -> io::Result<()> {
    let mut outcome = match retire_at(cgroup, kept) {
        // It went away meanwhile.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOENT | libc::ENODEV)) => Ok(()),
        outcome => outcome,
    };
    for entry in fs::read_dir(cgroup).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            outcome = outcome.and(retire_below(&entry.path(), kept));
        }
    }
    outcome
}

fn retire_at(cgroup: &Path, kept: Option<(&Path, u32)>) -> io::Result<()> {
    let folder = open(cgroup)?;
    for id in bpf::attached(folder.as_fd())? {
        let program = Program::with_id(id)?;
        if kept != Some((cgroup, id)) && program.name()? == NAME {
            bpf::detach(folder.as_fd(), &program)?;
        }
    }
    Ok(())
}

/// The pinned program, or a new one if none is pinned that looks into `map`.
fn program_for(map: &Map) -> io::Result<Program> {
    let path = program_pin();
    if let Ok(program) = Program::at(&path)
        && program.uses_only(map.id()?)?
    {
        return Ok(program);
    }
    let program = Program::load(NAME, &instructions(map.as_fd()))?;
    let new = path.with_file_name(format!("new-program-{VERSION}"));
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    bpf::pin(program.as_fd(), &new)?;
    fs::rename(&new, &path)?;
    Ok(program)
}

// A BPF file system takes no name with a dot in it.
fn devices_pin() -> PathBuf {
    Path::new(DIRECTORY).join(format!("devices-{VERSION}"))
}

fn program_pin() -> PathBuf {
    Path::new(DIRECTORY).join(format!("program-{VERSION}"))
}

fn open(cgroup: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(cgroup)
}

fn no_cgroup(path: &Path, error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => format!(
            "there is no cgroup {}: run 'systemctl start machine.slice', or name the cgroup of the guests in [guard] of \
             /etc/volcrypt/volcrypt.toml",
            path.display()
        ),
        _ => format!("the cgroup {} cannot be opened ({error})", path.display()),
    }
}
