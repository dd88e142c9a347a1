package sync

import (
	"bytes"
	"compress/gzip"
	"errors"
	"io"
)

// Compress makes what imps keeps in Secrets of its own smaller, with gzip: a token of ECR stands in a docker config twice for
// each registry, and every agent reads what is rendered.
func Compress(raw []byte) []byte {
	var buffer bytes.Buffer
	w := gzip.NewWriter(&buffer)
	_, _ = w.Write(raw) // a buffer takes everything
	_ = w.Close()
	return buffer.Bytes()
}

// errCompressed does not quote what it is about.
var errCompressed = errors.New("it is not what was compressed")

// Expand is the inverse of Compress, for at most so many bytes.
func Expand(compressed []byte, limit int) ([]byte, error) {
	r, err := gzip.NewReader(bytes.NewReader(compressed))
	if err != nil {
		return nil, errCompressed
	}
	raw, err := io.ReadAll(io.LimitReader(r, int64(limit)+1))
	if err != nil || len(raw) > limit {
		return nil, errCompressed
	}
	return raw, nil
}
