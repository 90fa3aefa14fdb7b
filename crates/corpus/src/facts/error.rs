use std::path::PathBuf;

/// Why a facts world could not be made or written.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// An option is out of range, or asks for more than the data files can give.
    #[error("facts option `{key}`: expected {expected}, found {found}")]
    Option {
        /// Name of the option, as in the config file.
        key: &'static str,
        /// What would be accepted.
        expected: String,
        /// What was given.
        found: String,
    },
    /// A data file is well-formed but breaks a rule of the world.
    #[error("facts data {file}, {place}: expected {expected}, found {found}")]
    Data {
        /// Name of the data file.
        file: &'static str,
        /// Line, key or template within the file.
        place: String,
        /// What the rule asks for.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A JSON data file cannot be parsed, or a record cannot be written as JSON.
    #[error("facts file {file}: {source}")]
    Json {
        /// Name of the file.
        file: &'static str,
        /// Position and cause.
        source: serde_json::Error,
    },
    /// An entity has too few ways to be told for a validation document that the corpus does not contain.
    #[error("entity {entity}: expected {expected} new validation documents, found {found} in {tries} tries")]
    NoNewDocument {
        /// Full name of the entity.
        entity: String,
        /// Validation documents that were asked for.
        expected: usize,
        /// Validation documents that were found.
        found: usize,
        /// Texts drawn for the missing document before giving up.
        tries: usize,
    },
    /// A file or folder cannot be written.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was attempted: "create", "write", "sync" or "rename".
        action: &'static str,
        /// File or folder that it was attempted on.
        path: PathBuf,
        /// Cause given by the operating system.
        source: std::io::Error,
    },
}

/// Result of this module.
pub type Result<T> = std::result::Result<T, Error>;
