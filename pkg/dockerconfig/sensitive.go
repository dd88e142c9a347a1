package dockerconfig

import (
	"fmt"
	"io"
	"log/slog"
)

// redacted is what every way of printing a Sensitive gives, also for an empty one.
const redacted = "REDACTED"

// Sensitive is a value that must not be printed: a password, a token, a rendered docker config. fmt (every verb),
// log/slog, encoding/json and everything else that knows encoding.TextMarshaler or fmt.Stringer print REDACTED.
// Reveal is the only way to the value.
//
// The value sits behind a function, not in a field. fmt calls no methods on unexported fields, and deep printers call
// none at all; they follow structs and pointers, but cannot look into a function. So a Sensitive stays closed in any
// struct, map or slice.
//
// The zero value is empty. Compare with Equal: == does not compile, and reflect.DeepEqual calls two non-empty values
// different. A Sensitive never changes and may be shared between goroutines.
type Sensitive struct {
	reveal func() string
}

// NewSensitive wraps a value. Bytes are copied: the caller may change or clear its slice afterwards.
func NewSensitive[T ~string | ~[]byte](value T) Sensitive {
	s := string(value)
	if s == "" {
		return Sensitive{}
	}
	return Sensitive{reveal: func() string { return s }}
}

// Reveal returns the value itself. Nothing that it returns may reach a log, an error, an Event or a status.
func (s Sensitive) Reveal() string {
	if s.reveal == nil {
		return ""
	}
	return s.reveal()
}

// Len returns the length of the value in bytes.
func (s Sensitive) Len() int { return len(s.Reveal()) }

// IsZero reports whether the value is empty. encoding/json's omitzero calls it.
func (s Sensitive) IsZero() bool { return s.reveal == nil }

// Equal reports whether both hold the same bytes. The time it takes depends on them.
func (s Sensitive) Equal(other Sensitive) bool { return s.Reveal() == other.Reveal() }

// Format implements fmt.Formatter: REDACTED for every verb.
func (Sensitive) Format(state fmt.State, _ rune) {
	_, _ = io.WriteString(state, redacted) // fmt has no way to report a failed write
}

// String returns REDACTED.
func (Sensitive) String() string { return redacted }

// MarshalText implements encoding.TextMarshaler, and with it what encoding/json and YAML libraries write: REDACTED.
// There is no way back: nothing decodes into a Sensitive.
func (Sensitive) MarshalText() ([]byte, error) { return []byte(redacted), nil }

// LogValue implements slog.LogValuer: REDACTED.
func (Sensitive) LogValue() slog.Value { return slog.StringValue(redacted) }
