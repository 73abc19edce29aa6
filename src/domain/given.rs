use std::path::{Path, PathBuf};

use roxmltree::Node;

use super::xml::children;

/// The places on the host that one device of a running domain has, or its firmware.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Given {
    /// Paths of files and devices; for a disk, all of its backing chain.
    paths: Vec<PathBuf>,
    /// Folders, which a device has with all that is in them.
    folders: Vec<PathBuf>,
}

impl Given {
    /// Those of every device, and of the firmware, in the live XML of a domain.
    ///
    /// Whatever an element of a device is called: an absolute path in it names a place that libvirt gives to QEMU. What
    /// people write about a domain (its name, description and metadata) is not looked at, and neither is the `<mirror>`
    /// of a disk, by which libvirt notes down to what a running job copies it.
    pub(crate) fn read(domain: &Node<'_, '_>) -> Vec<Given> {
        let devices = children(*domain, "devices").flat_map(|devices| devices.children());
        let all = devices.chain(children(*domain, "os")).filter(Node::is_element);
        all.map(|device| Given::default().with(&device)).filter(|given| *given != Given::default()).collect()
    }

    fn with(mut self, element: &Node<'_, '_>) -> Self {
        let is_source = element.tag_name().name() == "source";
        for attribute in element.attributes().filter(|attribute| is_absolute(attribute.value())) {
            match attribute.name() {
                "dir" if is_source => self.folders.push(attribute.value().into()),
                // The guest's name for it, which may look like a path of the host.
                "dir" => {}
                _ => self.paths.push(attribute.value().into()),
            }
        }
        self.paths.extend(element.text().map(str::trim).filter(|text| is_absolute(text)).map(PathBuf::from));
        let inner = element.children().filter(|inner| inner.is_element() && inner.tag_name().name() != "mirror");
        inner.fold(self, |given, inner| given.with(&inner))
    }

    /// The first path to a file or device that fits.
    pub fn find(&self, fits: impl Fn(&Path) -> bool) -> Option<&Path> {
        self.paths.iter().map(PathBuf::as_path).find(|path| fits(path))
    }

    /// The first folder that fits.
    pub fn find_folder(&self, fits: impl Fn(&Path) -> bool) -> Option<&Path> {
        self.folders.iter().map(PathBuf::as_path).find(|folder| fits(folder))
    }

    /// The other paths of the device than `path`: the rest of a disk's backing chain.
    pub fn besides<'a>(&'a self, path: &'a Path) -> impl Iterator<Item = &'a Path> {
        self.paths.iter().map(PathBuf::as_path).filter(move |other| *other != path)
    }
}

fn is_absolute(text: &str) -> bool {
    text.starts_with('/')
}

/// What a domain with the XML `text` is given.
#[cfg(test)]
pub fn given(text: &str) -> Vec<Given> {
    Given::read(&roxmltree::Document::parse(text).unwrap().root_element())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn describe(given: &Given) -> String {
        let folders = given.folders.iter().map(|folder| format!("all of {}", folder.display()));
        let paths = given.paths.iter().map(|path| path.display().to_string());
        paths.chain(folders).collect::<Vec<_>>().join(", ") + "\n"
    }

    #[test]
    fn places_are_read_as_the_golden_files_say() {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("xml-fixtures/given");
        let mut seen = 0;
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.extension().is_some_and(|extension| extension == "xml") {
                let found: String = given(&std::fs::read_to_string(&path).unwrap()).iter().map(describe).collect();
                let expected = std::fs::read_to_string(path.with_extension("expected")).unwrap();
                assert_eq!(found, expected, "{}", path.display());
                seen += 1;
            }
        }
        assert!(seen >= 3, "only {seen} golden files were found");
    }
}
