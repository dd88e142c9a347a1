package main

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"runtime/debug"
	"strconv"

	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	"k8s.io/klog/v2"
)

// Values of --log-level and --log-format.
const (
	levelDebug = "debug"
	levelInfo  = "info"
	levelWarn  = "warn"
	levelError = "error"

	formatJSON   = "json"
	formatText   = "text"
	formatLogfmt = "logfmt"
)

func levels() []string { return []string{levelDebug, levelInfo, levelWarn, levelError} }

// newLogger returns a logger of a valid level and format.
func newLogger(w io.Writer, level, format string) *slog.Logger {
	options := &slog.HandlerOptions{Level: map[string]slog.Level{
		levelDebug: slog.LevelDebug, levelInfo: slog.LevelInfo, levelWarn: slog.LevelWarn, levelError: slog.LevelError,
	}[level]}
	if format == formatText {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(w, options))
}

// takeOverLogs sends what client-go and the standard library log to the logger.
//
// client-go logs requests and their bodies, which hold credentials, from verbosity 6 on.
// It never gets there: debug is 4, slog's own number for it, and nothing is above.
func takeOverLogs(log *slog.Logger, level string) {
	slog.SetDefault(log)
	klog.SetSlogLogger(log)
	verbosity := 0
	if level == levelDebug {
		verbosity = -int(slog.LevelDebug)
	}
	_ = new(klog.Level).Set(strconv.Itoa(verbosity)) // the only way to set it; it fails for what is no number
	// The value of a panic may hold anything.
	utilruntime.PanicHandlers = []func(context.Context, any){func(_ context.Context, p any) {
		log.Error("panic", "type", fmt.Sprintf("%T", p), "stack", string(debug.Stack()))
	}}
}
