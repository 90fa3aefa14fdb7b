//! Parquet files.

use std::fs::File;
use std::io::{Read, Write};
use std::sync::Arc;

use ::parquet::basic::{LogicalType, Repetition, Type as PhysicalType};
use ::parquet::errors::ParquetError;
use ::parquet::file::metadata::ParquetMetaData;
use ::parquet::file::reader::{ChunkReader, FileReader, SerializedFileReader};
use ::parquet::record::reader::{ReaderIter, TreeBuilder};
use ::parquet::record::{Field, Row};
use ::parquet::schema::types::{SchemaDescriptor, Type};

use super::{Document, SourceOptions, file_name};
use crate::{Error, Result};

/// Rows decoded at a time; small, since a row is a whole document.
const BATCH_ROWS: usize = 64;

/// The documents of a parquet file, one a row.
pub(super) struct ParquetDocuments<R: ChunkReader> {
    reader: SerializedFileReader<R>,
    /// The columns read, and which of them is what.
    columns: Arc<SchemaDescriptor>,
    url: String,
    options: Columns,
    group: usize,
    rows: Option<ReaderIter>,
    row: u64,
}

struct Columns {
    text: String,
    id: Option<String>,
    label: Option<String>,
}

impl<R: ChunkReader + 'static> ParquetDocuments<R> {
    /// Reads the metadata and finds the columns. Fails on a file that is not parquet, on a missing
    /// column, and on a text column that is not one of strings.
    pub(super) fn new(reader: R, url: &str, options: &SourceOptions) -> Result<Self> {
        let reader = SerializedFileReader::new(reader).map_err(|source| parquet_error(url, 0, source))?;
        let options = Columns {
            text: options.text_key.clone(),
            id: options.id_key.clone(),
            label: options.label_key.clone(),
        };
        let columns = projection(reader.metadata(), &options, url)?;
        Ok(Self { reader, columns, url: url.to_owned(), options, group: 0, rows: None, row: 0 })
    }

    fn next_document(&mut self) -> Result<Option<Document>> {
        let Some(row) = self.next_row().map_err(|source| parquet_error(&self.url, self.row + 1, source))?
        else {
            return Ok(None);
        };
        self.row += 1;
        self.document(row).map(Some)
    }

    fn next_row(&mut self) -> ::parquet::errors::Result<Option<Row>> {
        loop {
            if let Some(row) = self.rows.as_mut().and_then(Iterator::next) {
                return row.map(Some);
            }
            if self.group == self.reader.num_row_groups() {
                return Ok(None);
            }
            let group = self.reader.get_row_group(self.group)?;
            let builder = TreeBuilder::new().with_batch_size(BATCH_ROWS);
            self.rows = Some(builder.as_iter(self.columns.clone(), &*group)?);
            self.group += 1;
        }
    }

    fn document(&self, row: Row) -> Result<Document> {
        let (mut text, mut id, mut label) = (None, None, None);
        for (name, field) in row.into_columns() {
            if self.options.id.as_ref() == Some(&name) {
                id = Some(self.word(&name, &field)?);
            }
            if self.options.label.as_ref() == Some(&name) {
                label = match &field {
                    Field::Null => None,
                    field => Some(self.word(&name, field)?),
                };
            }
            if self.options.text == name {
                text = Some(self.text(field)?);
            }
        }
        let text = text.ok_or_else(|| self.missing(&self.options.text))?;
        let id = match (id, &self.options.id) {
            (Some(id), _) => id,
            (None, None) => format!("{}:{}", file_name(&self.url), self.row),
            (None, Some(key)) => return Err(self.missing(key)),
        };
        Ok(Document { id, label, text })
    }

    fn text(&self, field: Field) -> Result<String> {
        match field {
            Field::Str(text) => Ok(text),
            // Writers that leave out the annotation store strings as plain bytes.
            Field::Bytes(bytes) => match std::str::from_utf8(bytes.data()) {
                Ok(text) => Ok(text.to_owned()),
                Err(e) => Err(Error::Utf8 { url: self.url.clone(), record: self.row, byte: e.valid_up_to() }),
            },
            other => Err(self.wrong_type(&self.options.text, "a string", &other)),
        }
    }

    /// A string or a number as text.
    fn word(&self, name: &str, field: &Field) -> Result<String> {
        match field {
            Field::Str(text) => Ok(text.clone()),
            Field::Bytes(_) => self.text(field.clone()),
            Field::Bool(value) => Ok(value.to_string()),
            Field::Byte(value) => Ok(value.to_string()),
            Field::Short(value) => Ok(value.to_string()),
            Field::Int(value) => Ok(value.to_string()),
            Field::Long(value) => Ok(value.to_string()),
            Field::UByte(value) => Ok(value.to_string()),
            Field::UShort(value) => Ok(value.to_string()),
            Field::UInt(value) => Ok(value.to_string()),
            Field::ULong(value) => Ok(value.to_string()),
            other => Err(self.wrong_type(name, "a string, an integer or a boolean", other)),
        }
    }

    fn missing(&self, key: &str) -> Error {
        missing(&self.url, key, self.reader.metadata())
    }

    fn wrong_type(&self, key: &str, expected: &'static str, found: &Field) -> Error {
        let found = match found {
            Field::Null => "null".to_owned(),
            other => format!("{other}"),
        };
        Error::WrongType { url: self.url.clone(), record: self.row, key: key.to_owned(), expected, found }
    }
}

impl<R: ChunkReader + 'static> Iterator for ParquetDocuments<R> {
    type Item = Result<Document>;

    fn next(&mut self) -> Option<Self::Item> {
        self.next_document().transpose()
    }
}

/// The schema reduced to the columns that are read.
fn projection(metadata: &ParquetMetaData, wanted: &Columns, url: &str) -> Result<Arc<SchemaDescriptor>> {
    let schema = metadata.file_metadata().schema();
    let find = |key: &String| schema.get_fields().iter().find(|field| field.name() == key).cloned();
    let text = find(&wanted.text).ok_or_else(|| missing(url, &wanted.text, metadata))?;
    check_text(&text, url)?;
    let mut fields = vec![text];
    let id = match &wanted.id {
        Some(key) => Some(find(key).ok_or_else(|| missing(url, key, metadata))?),
        None => None,
    };
    for field in id.into_iter().chain(wanted.label.as_ref().and_then(find)) {
        if field.is_group() || field.get_basic_info().repetition() == Repetition::REPEATED {
            return Err(column_type(url, &field, "one value a row"));
        }
        if fields.iter().all(|other| other.name() != field.name()) {
            fields.push(field);
        }
    }
    let projection = Type::group_type_builder(schema.name())
        .with_fields(fields)
        .build()
        .map_err(|source| parquet_error(url, 0, source))?;
    Ok(Arc::new(SchemaDescriptor::new(Arc::new(projection))))
}

fn check_text(field: &Type, url: &str) -> Result<()> {
    let is_text = field.is_primitive()
        && field.get_physical_type() == PhysicalType::BYTE_ARRAY
        && field.get_basic_info().repetition() != Repetition::REPEATED
        && !matches!(field.get_basic_info().logical_type_ref(), Some(LogicalType::Decimal { .. }));
    if is_text { Ok(()) } else { Err(column_type(url, field, "a string")) }
}

fn column_type(url: &str, field: &Type, expected: &'static str) -> Error {
    let found = match field {
        Type::PrimitiveType { physical_type, .. } => format!("{physical_type} column"),
        Type::GroupType { .. } => "nested column".to_owned(),
    };
    Error::WrongType { url: url.to_owned(), record: 0, key: field.name().to_owned(), expected, found }
}

fn missing(url: &str, key: &str, metadata: &ParquetMetaData) -> Error {
    let fields = metadata.file_metadata().schema().get_fields();
    let found = fields.iter().map(|field| format!("`{}`", field.name())).collect::<Vec<_>>().join(", ");
    Error::MissingKey { url: url.to_owned(), record: 0, key: key.to_owned(), found }
}

fn parquet_error(url: &str, row: u64, source: ParquetError) -> Error {
    Error::Parquet { url: url.to_owned(), row, source }
}

/// Decompresses a parquet file into a temporary one: its reader must jump, which no decompressor can.
pub(super) fn unpack(reader: &mut impl Read, url: &str) -> Result<File> {
    let temporary = |source| Error::Url {
        url: url.to_owned(),
        reason: format!("cannot be decompressed into a temporary file: {source}"),
    };
    let mut file = tempfile::tempfile().map_err(temporary)?;
    let mut buffer = vec![0; 1 << 20];
    loop {
        match reader.read(&mut buffer).map_err(|source| Error::reading(url, 0, source))? {
            0 => break,
            n => file.write_all(&buffer[..n]).map_err(temporary)?,
        }
    }
    Ok(file)
}
