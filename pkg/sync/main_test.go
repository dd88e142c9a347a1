package sync

import (
	"encoding/base64"
	"testing"

	"github.com/stretchr/testify/require"
	"go.uber.org/goleak"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"sigs.k8s.io/yaml"
)

func TestMain(m *testing.M) {
	// The second of them limits the rate of errors by one clock for the whole process, which
	// the bubbles of synctest must not share.
	utilruntime.ErrorHandlers = utilruntime.ErrorHandlers[:1]
	goleak.VerifyTestMain(m)
}

// canary stands for a credential. No test may find it where things are printed.
const canary = "canary-8c31f7-never-printed"

// requireSilent fails where a text holds the canary, in clear or in base64 at any offset.
func requireSilent(t *testing.T, text string) {
	t.Helper()
	require.NotContains(t, text, canary)
	for offset := range 3 {
		encoded := base64.StdEncoding.EncodeToString([]byte("xx"[:offset%3] + canary))
		require.NotContains(t, text, encoded[4:len(encoded)-4])
	}
}

// fromYAML decodes a literal of a test strictly.
func fromYAML[T any](t *testing.T, text string) T {
	t.Helper()
	var value T
	require.NoError(t, yaml.UnmarshalStrict([]byte(text), &value))
	return value
}
