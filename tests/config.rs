//! The configuration file: the shipped example, and files with the error or the explanation that
//! each of them has to give.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proptest::prelude::*;
use volcrypt::policy::{Config, KeyManagerConfig, Profile, WhenUnreachable, WhenUnwritable};

#[test]
fn every_faulty_file_gives_its_sentence() {
    let files = pairs("tests/config");
    assert!(files.len() >= 15, "only {} files", files.len());
    compare(files, |text, name| match Config::parse(text, name) {
        Ok(_) => "no error".to_owned(),
        Err(error) => format!("{error}\n"),
    });
}

#[test]
fn every_explanation_is_as_expected() {
    let files = pairs("tests/explain");
    assert!(!files.is_empty());
    compare(files, |text, name| {
        Config::parse(text, name).map_or_else(|error| format!("{error}\n"), |config| config.explain())
    });
}

#[test]
fn the_example_protects_nothing() {
    let config = Config::load(&example()).unwrap();
    assert!(config.rules().is_empty());
    assert!(config.explain().contains("No volume is protected: there is no rule that protects one."));
}

#[test]
fn the_example_shows_every_setting_with_its_default() {
    let text = fs::read_to_string(example()).unwrap();
    // Settings are commented out without a space, prose has one.
    let is_setting =
        |line: &&str| line.strip_prefix('#').is_some_and(|rest| !rest.is_empty() && !rest.starts_with(' '));
    let settings: Vec<&str> = text.lines().filter(is_setting).map(|line| &line[1..]).collect();
    let shown = Config::parse(&settings.join("\n"), "volcrypt.toml").unwrap();
    let default = Config::parse("", "empty").unwrap();
    assert_eq!(shown.key_manager, default.key_manager);
    assert_eq!(shown.key_cache, default.key_cache);
    assert_eq!(shown.daemon, default.daemon);
    assert_eq!(shown.hook, default.hook);
    assert_eq!(shown.policy, default.policy);
    assert_eq!(shown.guard, default.guard);
    assert_eq!(shown.audit, default.audit);
    assert_eq!(shown.profile("default"), default.profile("default"));
    assert_eq!(shown.rules().len(), 1);
    assert!(shown.warnings().is_empty(), "{:?}", shown.warnings());
    // The serde messages list every key there is; each has to be shown.
    let sections = [
        "key_manager",
        "kmip",
        "barbican",
        "key_cache",
        "daemon",
        "hook",
        "policy",
        "guard",
        "audit",
        "profiles.default",
    ];
    for section in sections {
        let error = Config::parse(&format!("[{section}]\nnone-such = 1"), "x").unwrap_err().to_string();
        // Of what excludes each other one is shown.
        let others = ["application_credential_name", "user", "user_domain", "project", "project_domain"];
        let hidden = |key: &&str| others.contains(key) || ["file", "i_know_this_is_insecure"].contains(key);
        let known = error.split('`').skip(3).step_by(2).filter(|key| !hidden(key));
        for key in known {
            assert!(
                settings.iter().any(|line| line.starts_with(&format!("{key} = "))),
                "{section}: {key} is not shown"
            );
        }
    }
}

#[test]
fn an_empty_file_has_the_documented_defaults() {
    let config = Config::parse("", "empty").unwrap();
    assert_eq!(config.key_manager, KeyManagerConfig::Embedded { directory: "/var/lib/volcrypt".into() });
    assert_eq!(config.daemon.open_deadline, Duration::from_secs(20));
    assert_eq!(config.daemon.qemu_users, ["libvirt-qemu", "qemu"]);
    assert_eq!(config.hook.deadline, Duration::from_secs(30));
    assert_eq!(config.hook.when_daemon_unreachable, WhenUnreachable::Refuse);
    assert_eq!(config.audit.when_unwritable, WhenUnwritable::Refuse);
    assert_eq!(config.profile("default"), Some(&Profile::default()));
    assert_eq!(config.profile("other"), None);
}

#[test]
fn a_key_file_needs_consent() {
    let text = "[key_manager]\ntype = 'key-file'\nfile = '/k'\n";
    assert!(Config::parse(text, "x").is_err());
    assert!(Config::parse(&format!("{text}i_know_this_is_insecure = false\n"), "x").is_err());
    let config = Config::parse(&format!("{text}i_know_this_is_insecure = true\n"), "x").unwrap();
    assert_eq!(config.key_manager, KeyManagerConfig::KeyFile { file: "/k".into() });
}

#[test]
fn a_file_that_cannot_be_used_says_what_to_do() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("volcrypt.toml");
    let error = |path: &Path| Config::load(path).unwrap_err().to_string();
    assert!(error(&path).contains("copy /usr/share/doc/volcrypt/examples/volcrypt.toml"), "{}", error(&path));
    assert!(error(directory.path()).contains("no regular file"), "{}", error(directory.path()));
    fs::write(&path, b"\n\n# \xff\n").unwrap();
    assert!(error(&path).starts_with(&format!("{}:3: ", path.display())), "{}", error(&path));
    fs::write(&path, "#".repeat(1 << 20)).unwrap();
    assert!(Config::load(&path).is_ok());
    fs::write(&path, "#".repeat((1 << 20) + 1)).unwrap();
    assert!(error(&path).contains("too large"), "{}", error(&path));
}

#[test]
fn a_fifo_does_not_hang_the_reader() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &path, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    assert!(Config::load(&path).unwrap_err().to_string().contains("no regular file"));
}

/// Files that come near a valid one: its own tokens in any order, with text that nobody should write.
fn near_configuration() -> impl Strategy<Value = String> {
    let tokens = vec![
        "[[rules]]\n",
        "[hook]\n",
        "[profiles.\"a\\nb\"]\n",
        "name = ",
        "wwid = ",
        "volume_id = ",
        "profile = ",
        "lun = ",
        "type = ",
        "directory = ",
        "[key_manager]\n",
        "'(?<id>.*)'\n",
        "\"${id}\"\n",
        "\"${a\\nb}\"\n",
        "\"(?x)a\\n#\"\n",
        "\"a\\u0000\\nb\"\n",
        "1\n",
        "-1\n",
        "\"\"\"\n\n\"\"\"\n",
        "\n",
        "é",
        "\r\n",
        "=",
        "[",
        "\0",
        "\"a\\nb\" = 1\n",
    ];
    prop::collection::vec(prop::sample::select(tokens), 0..24).prop_map(|tokens| tokens.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn any_text_gives_a_configuration_or_one_line(text in prop_oneof![near_configuration(), ".{0,200}"]) {
        if let Err(error) = Config::parse(&text, "FILE") {
            let error = error.to_string();
            prop_assert!(error.starts_with("FILE:"), "{error:?}");
            prop_assert!(!error.contains('\n'), "{error:?}");
            prop_assert!(error.contains("; "), "no remedy: {error:?}");
        }
    }
}

fn example() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("packaging/volcrypt.toml")
}

/// Every input of a folder with what is expected of it, a path that may not exist yet.
fn pairs(folder: &str) -> Vec<(PathBuf, PathBuf)> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join(folder);
    let mut paths: Vec<PathBuf> = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    let inputs = paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == "toml"));
    let pairs: Vec<_> = inputs.map(|path| (path.clone(), path.with_extension("expected"))).collect();
    assert_eq!(paths.len(), 2 * pairs.len(), "a file without its partner");
    pairs
}

fn compare(pairs: Vec<(PathBuf, PathBuf)>, answer: impl Fn(&str, &str) -> String) {
    let mut differences = String::new();
    for (input, expected) in pairs {
        let name = input.file_name().unwrap().to_str().unwrap();
        let answer = answer(&fs::read_to_string(&input).unwrap(), name);
        let expected = fs::read_to_string(expected).unwrap();
        if answer != expected {
            differences.push_str(&format!("{name}\n  expected: {expected}  but is:   {answer}"));
        }
    }
    assert!(differences.is_empty(), "\n{differences}");
}
