package policy

import (
	"bytes"
	_ "embed" // for the schemas
)

//go:embed schema.json
var policySchema []byte

//go:embed cases.schema.json
var casesSchema []byte

// Schema is the JSON Schema (draft 2020-12) of policy files, for editors. It accepts
// whatever Parse accepts; its $comment lists what Parse alone refuses. The caller
// owns the bytes.
func Schema() []byte { return bytes.Clone(policySchema) }

// CasesSchema is the same for files of cases and ParseCases.
func CasesSchema() []byte { return bytes.Clone(casesSchema) }
