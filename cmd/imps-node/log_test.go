package main

import (
	"bytes"
	"context"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/klog/v2"
)

// capture sends all logs to a buffer for the length of a test. The loggers of client-go
// and of the standard library belong to the process: tests that call it run alone.
func capture(t *testing.T, level, format string) *bytes.Buffer {
	t.Helper()
	before, handlers := slog.Default(), utilruntime.PanicHandlers
	t.Cleanup(func() {
		slog.SetDefault(before)
		utilruntime.PanicHandlers = handlers
		klog.ClearLogger()
		require.NoError(t, new(klog.Level).Set("0"))
	})
	var logs bytes.Buffer
	takeOverLogs(newLogger(&logs, level, format), level)
	return &logs
}

func TestClientGoNeverLogsBodies(t *testing.T) {
	tests := map[string]struct {
		level   string
		highest int // of klog's verbosities
	}{
		"at debug": {levelDebug, 4},
		"at info":  {levelInfo, 0},
		"at warn":  {levelWarn, -1},
		"at error": {levelError, -1},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			logs := capture(t, test.level, formatJSON)
			for verbosity := range klog.Level(11) {
				klog.V(verbosity).InfoS("by the global logger", "verbosity", int(verbosity))
				klog.FromContext(t.Context()).V(int(verbosity)).Info("by the context's logger", "verbosity", int(verbosity))
			}
			for _, global := range []bool{true, false} {
				for verbosity := range 11 {
					line := `"by the context's logger","verbosity":` + string(rune('0'+verbosity)) + "}"
					if global {
						line = strings.Replace(line, "context's", "global", 1)
					}
					if verbosity > test.highest || verbosity > 9 {
						require.NotContains(t, logs.String(), line)
					} else {
						require.Contains(t, logs.String(), line)
					}
				}
			}
			require.False(t, klog.V(5).Enabled())
			require.False(t, klog.FromContext(t.Context()).V(5).Enabled())
			require.False(t, klog.Background().V(5).Enabled())
		})
	}
}

func TestLogsAreJSONOrText(t *testing.T) {
	logs := capture(t, levelInfo, formatJSON)
	klog.ErrorS(context.Canceled, "a line of client-go")
	slog.Default().Warn("a line of the standard library")
	for line := range strings.Lines(logs.String()) {
		require.True(t, json.Valid([]byte(line)), line)
	}

	logs = capture(t, levelInfo, formatText)
	slog.Default().Warn("a line", "key", "a value")
	require.Contains(t, logs.String(), `level=WARN msg="a line" key="a value"`)
}

func TestPanicsAreToldWithoutTheirValue(t *testing.T) {
	logs := capture(t, levelInfo, formatJSON)
	require.Panics(t, func() {
		defer utilruntime.HandleCrash()
		panic("p4ssw0rd")
	})
	require.Contains(t, logs.String(), `"msg":"panic","type":"string"`)
	require.Contains(t, logs.String(), "TestPanicsAreToldWithoutTheirValue")
	require.NotContains(t, logs.String(), "p4ssw0rd")
}
