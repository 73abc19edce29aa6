use super::*;
use crate::cli::doctor::LibvirtView;
use crate::protocol::{GuardStatus, MappingStatus, Response, Status};
use std::cell::RefCell;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixListener;
use std::path::PathBuf;

type Call = (String, Operation, String, Option<Affect>);

thread_local! {
    static CALLS: RefCell<Vec<Call>> = RefCell::default();
}

/// A libvirt with the domain `web`, which runs, and `db`, which does not.
fn libvirt(change: Change) -> Libvirt {
    let no_survey = || -> Result<LibvirtView, String> { Err("not asked".into()) };
    Libvirt { survey: no_survey, look: |_| Ok(None), define: |_| Ok(()), find, change }
}

fn find(name: &str) -> Result<Option<Found>, String> {
    let running = name == "web";
    let found = Found { name: name.into(), uuid: format!("uuid-{name}"), xml: "<domain/>".into(), running };
    Ok(["web", "db"].contains(&name).then_some(found))
}

fn takes(uuid: &str, operation: Operation, xml: &str, affect: Option<Affect>) -> Result<(), String> {
    CALLS.with_borrow_mut(|calls| calls.push((uuid.into(), operation, xml.into(), affect)));
    Ok(())
}

fn refuses(_: &str, _: Operation, _: &str, _: Option<Affect>) -> Result<(), String> {
    Err("libvirt says: target sdb already exists".into())
}

/// Gives these answers, each once its client has hung up or has the answer, and then the requests.
fn daemon(answers: Vec<Reply>) -> (tempfile::TempDir, thread::JoinHandle<Vec<Request>>) {
    let folder = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(folder.path().join("control.sock")).unwrap();
    let serve = move |answer: Reply| {
        let (mut stream, _) = listener.accept().unwrap();
        let mut line = String::new();
        BufReader::new(&stream).read_line(&mut line).unwrap();
        writeln!(stream, "{}", serde_json::to_string(&Response::Done(answer)).unwrap()).unwrap();
        // Until the client hangs up.
        let _ = stream.read(&mut [0]);
        serde_json::from_str(&line).unwrap()
    };
    (folder, thread::spawn(move || answers.into_iter().map(serve).collect()))
}

fn arguments(folder: &tempfile::TempDir, domain: &str, options: &str) -> DeviceArguments {
    let file = folder.path().join("disk.xml");
    std::fs::write(&file, "<disk/>").unwrap();
    let has = |option: &str| options.split(' ').any(|given| given == option);
    DeviceArguments {
        domain: domain.into(),
        file,
        live: has("--live"),
        config: has("--config"),
        current: has("--current"),
        persistent: has("--persistent"),
    }
}

fn device(volume: Option<&str>) -> Reply {
    Reply::Device { xml: "<disk mapped=''/>".into(), volume: volume.map(|volume| volume.parse().unwrap()) }
}

#[test]
fn options_mean_what_they_mean_to_virsh() {
    let (both, config, live) = (
        Affect { live: true, config: true },
        Affect { live: false, config: true },
        Affect { live: true, config: false },
    );
    for (domain, options, affect, at_once) in [
        ("web", "", None, true),
        ("db", "", None, false),
        ("web", "--current", Some(Affect::default()), true),
        ("db", "--current", Some(Affect::default()), false),
        ("web", "--live", Some(live), true),
        ("db", "--live", Some(live), false),
        ("web", "--config", Some(config), false),
        ("web", "--live --config", Some(both), true),
        ("web", "--persistent", Some(both), true),
        ("db", "--persistent", Some(config), false),
    ] {
        let (folder, served) = daemon(vec![device(Some("a"))]);
        let socket = folder.path().join("control.sock");
        let text = attach(&Daemon { socket: &socket }, &arguments(&folder, domain, options), libvirt(takes)).unwrap();
        let call = CALLS.with_borrow_mut(|calls| calls.pop()).unwrap();
        let expected = (format!("uuid-{domain}"), Operation::Attach, "<disk mapped=''/>".to_owned(), affect);
        assert_eq!(call, expected, "{domain} {options}");
        assert_eq!(!text.contains("next start"), at_once, "{domain} {options}: {text}");
        match served.join().unwrap().pop() {
            Some(Request::Attach { device, live, keep: false, .. }) => {
                assert_eq!((device.as_str(), live), ("<disk/>", at_once))
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn what_libvirt_refuses_is_held_no_longer_when_the_command_ends() {
    let (folder, served) = daemon(vec![device(Some("a"))]);
    let socket = folder.path().join("control.sock");
    let error = attach(&Daemon { socket: &socket }, &arguments(&folder, "web", ""), libvirt(refuses)).unwrap_err();
    assert_eq!(error.to_string(), "libvirt says: target sdb already exists");
    // It has heard the client hang up.
    assert_eq!(served.join().unwrap().len(), 1);
}

#[test]
fn what_makes_no_sense_is_refused_before_anybody_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let nowhere = Daemon { socket: Path::new("/nowhere") };
    let sentence = |arguments: &DeviceArguments| attach(&nowhere, arguments, libvirt(refuses)).unwrap_err().to_string();
    for options in ["--current --live", "--current --config", "--current --persistent"] {
        assert!(sentence(&arguments(&folder, "web", options)).starts_with("--current goes with none of"));
    }
    let none = sentence(&arguments(&folder, "x\u{1b}", ""));
    assert_eq!(none, "there is no domain x?: 'virsh list --all' shows those there are");
    let missing = DeviceArguments { file: PathBuf::from("/nowhere/at-all"), ..arguments(&folder, "web", "") };
    assert!(sentence(&missing).starts_with("/nowhere/at-all cannot be read ("));
}

#[test]
fn a_detached_disks_mapping_is_said_to_be_gone_or_whose_it_is() {
    let status = |domains: Option<&[&str]>| {
        let mapping = |domains: &[&str]| MappingStatus {
            volume: "a".parse().unwrap(),
            name: "volcrypt-a".into(),
            device: "/dev/dm-0".into(),
            backing: "/dev/sda".into(),
            format: "plain".into(),
            cipher: "aes-xts-plain64".into(),
            open_count: 1,
            deferred_removal: true,
            domains: domains.iter().map(|&domain| domain.to_owned()).collect(),
            held_for: vec![],
            since: None,
        };
        Reply::Status(Box::new(Status {
            version: "x".into(),
            configuration_error: None,
            key_store_error: None,
            keys_left_behind: None,
            mappings: domains.into_iter().map(mapping).collect(),
            guests: vec![],
            intercept: crate::policy::Intercept::Xml,
            guard: GuardStatus::default(),
            key_cache: None,
        }))
    };
    for (answers, expected) in [
        (vec![device(None)], "Detached from domain web.\n"),
        (vec![device(Some("a")), status(None)], "Detached from domain web.\nThe mapping of volume a is gone.\n"),
        (
            vec![device(Some("a")), status(Some(&["web", "db"])), status(Some(&["db"]))],
            "Detached from domain web.\nThe mapping of volume a stays for db.\n",
        ),
    ] {
        let (folder, served) = daemon(answers);
        let socket = folder.path().join("control.sock");
        let text = detach(&Daemon { socket: &socket }, &arguments(&folder, "web", "--live"), libvirt(takes)).unwrap();
        assert_eq!(text, expected);
        assert_eq!(CALLS.with_borrow_mut(|calls| calls.pop()).unwrap().1, Operation::Detach);
        served.join().unwrap();
    }
}
