//! Key managers that hold many other keys, which are put into their databases directly: a thousand, or as many as
//! VOLCRYPT_OTHER_KEYS says. What takes how long is printed.

use std::path::Path;
use std::time::{Duration, Instant};

use rusqlite::Connection;

use volcrypt::keys::kmip::{KmipConfig, KmipKeyManager};
use volcrypt::keys::{Description, KeyManager};
use volcrypt::policy::Profile;
use volcrypt::refusal::Reason;
use volcrypt::store::EnrolledDevice;
use volcrypt::volume::VolumeId;

use super::barbican::Barbican;
use super::pykmip::PyKmip;

fn others() -> usize {
    std::env::var("VOLCRYPT_OTHER_KEYS").map_or(1000, |number| number.parse().unwrap())
}

fn volume(name: &str) -> VolumeId {
    name.parse().unwrap()
}

fn wanted() -> Description {
    let device = EnrolledDevice { wwid: Some("naa.6".to_owned()), ..EnrolledDevice::default() };
    Description::new(device, 4096, ("default", &Profile::default()), None, 7)
}

/// A database in which the rows of one key are copied, once for each number `i` from 1 to the last.
struct Copies(Connection, usize);

impl Copies {
    fn of(database: &Path, last: usize) -> Self {
        let connection = Connection::open(database).unwrap();
        connection.busy_timeout(Duration::from_secs(30)).unwrap();
        connection.execute_batch("BEGIN IMMEDIATE").unwrap();
        Copies(connection, last)
    }

    /// Copies the rows of `table` for which `is_meant`, with other values in some columns.
    fn copy(&self, table: &str, is_meant: &str, changed: &[(&str, &str)]) {
        let query = format!("SELECT name FROM pragma_table_info('{table}')");
        let mut names = self.0.prepare(&query).unwrap();
        let names: Vec<String> = names.query_map([], |row| row.get(0)).unwrap().flatten().collect();
        let value = |name: &String| {
            let change = changed.iter().find(|(column, _)| column == name);
            change.map_or(format!("\"{name}\""), |(_, value)| (*value).to_owned())
        };
        let values: Vec<String> = names.iter().map(value).collect();
        let names = names.iter().map(|name| format!("\"{name}\"")).collect::<Vec<_>>().join(", ");
        let last = self.1;
        let copied = format!(
            "WITH RECURSIVE numbers(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM numbers WHERE i < {last}) \
             INSERT INTO {table} ({names}) SELECT {} FROM {table}, numbers WHERE {is_meant}",
            values.join(", ")
        );
        assert!(self.0.execute(&copied, []).unwrap() >= last, "{table}");
    }

    fn done(self) {
        self.0.execute_batch("COMMIT").unwrap();
    }
}

/// What every key manager promises, in time for `deadline`; `make` says whether it is asked for a new key, too.
fn keeps_its_promises(manager: &dyn KeyManager, who: &str, deadline: Duration, make: bool) {
    let timed = |what: &str, work: &mut dyn FnMut()| {
        let started = Instant::now();
        work();
        let took = started.elapsed();
        eprintln!("{who} with {} other keys: {what} took {} ms", others(), took.as_millis());
        took
    };
    let in_time = |what: &str, work: &mut dyn FnMut()| assert!(timed(what, work) < deadline, "{what}");
    let (before, new) = (volume("template"), volume("one.of.many"));
    in_time("get of a key that is not there", &mut || {
        assert_eq!(manager.get(&new).err().unwrap().reason(), Reason::NoKey);
    });
    in_time("get", &mut || drop(manager.get(&before).unwrap()));
    if make {
        let mut made = None;
        timed("create", &mut || made = Some(manager.create(&new, &wanted()).unwrap().0));
        assert!(manager.get(&new).unwrap().same_as(&made.unwrap()));
    }
    let mut listed = Vec::new();
    timed("list", &mut || listed = manager.list().unwrap());
    let mut names: Vec<_> = listed.iter().map(|info| info.volume.to_string()).collect();
    names.sort();
    names.dedup();
    assert_eq!(names.len(), others() + 1 + usize::from(make));
    for name in [before.to_string(), format!("other-{}", others())] {
        assert!(names.contains(&name), "{name}");
    }
    let gone = if make { new } else { before };
    in_time("destroy", &mut || manager.destroy(&gone).unwrap());
    assert_eq!(manager.get(&gone).err().unwrap().reason(), Reason::NoKey);
}

/// Copies the first object of `server`, its own number 1, to those after it, with other values for name and application
/// data.
pub fn copy_in_pykmip(server: &PyKmip, copies: usize, name: &str, data: &str) {
    let copies = Copies::of(&server.authority().path("pykmip.db"), copies);
    for table in ["managed_objects", "crypto_objects", "keys", "symmetric_keys"] {
        copies.copy(table, "uid = 1", &[("uid", "1 + i")]);
    }
    copies.copy("managed_object_names", "mo_uid = 1", &[("id", "NULL"), ("mo_uid", "1 + i"), ("name", name)]);
    copies.copy("app_specific_info", "id = 1", &[("id", "1 + i"), ("application_data", data)]);
    let ids = [("managed_object_id", "1 + i"), ("app_specific_info_id", "1 + i")];
    copies.copy("app_specific_info_map", "managed_object_id = 1", &ids);
    copies.copy("object_groups", "id = 1", &[("id", "1 + i")]);
    let ids = [("managed_object_id", "1 + i"), ("object_group_id", "1 + i")];
    copies.copy("object_group_map", "managed_object_id = 1", &ids);
    copies.done();
}

#[test]
fn kmip() {
    let server = PyKmip::start();
    server.manager().create(&volume("template"), &wanted()).unwrap();
    let data = "'other-' || i || substr(application_data, instr(application_data, ' '))";
    copy_in_pykmip(&server, others(), "'volcrypt/other-' || i", data);
    // It looks at every object that it has, each time that it is asked for a name: too long to choose a key by.
    let config = KmipConfig { deadline: Duration::from_secs(60), ..server.config("client", vec![server.address()]) };
    keeps_its_promises(&KmipKeyManager::new(config), "PyKMIP", Duration::from_secs(60), false);
}

#[test]
fn barbican() {
    let servers = Barbican::start();
    servers.manager("host1").create(&volume("template"), &wanted()).unwrap();
    let copies = Copies::of(&servers.database(), others());
    let id = "printf('%08x-0000-4000-8000-000000000000', i)";
    copies.copy("secrets", "name = 'volcrypt/template'", &[("id", id), ("name", "'volcrypt/other-' || i")]);
    let template = "secret_id = (SELECT id FROM secrets WHERE name = 'volcrypt/template')";
    let own = "printf('%08x', i) || substr(id, 9)";
    for table in ["encrypted_data", "secret_store_metadata"] {
        copies.copy(table, template, &[("id", own), ("secret_id", id)]);
    }
    let value = "CASE \"key\" WHEN 'volcrypt-volume' THEN 'other-' || i ELSE value END";
    copies.copy("secret_user_metadata", template, &[("id", own), ("secret_id", id), ("value", value)]);
    copies.done();
    keeps_its_promises(&servers.manager("host1"), "Barbican", Duration::from_secs(30), true);
}
