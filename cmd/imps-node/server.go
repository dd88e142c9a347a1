package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	impsync "github.com/imps-node/imps/pkg/sync"
)

// shutdownTimeout is how long requests may take to end when the process does.
const shutdownTimeout = time.Second

// server serves one handler on one address. A nil server is off.
type server struct {
	listener net.Listener
	http     *http.Server
}

// listen takes the address, so that one that cannot be had is an error at once.
func listen(ctx context.Context, address string, handler http.Handler, log *slog.Logger) (*server, error) {
	if isOff(address) {
		return nil, nil
	}
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return &server{listener: listener, http: &http.Server{
		Handler:           handler,
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      30 * time.Second,
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(log.Handler(), slog.LevelDebug),
	}}, nil
}

func (s *server) address() string {
	if s == nil {
		return "off"
	}
	return s.listener.Addr().String()
}

func (s *server) run(ctx context.Context) error {
	if s == nil {
		return nil
	}
	return impsync.RunTasks(ctx,
		func(context.Context) error {
			if err := s.http.Serve(s.listener); !errors.Is(err, http.ErrServerClosed) {
				return fmt.Errorf("serve %s: %w", s.listener.Addr(), err)
			}
			return nil
		},
		func(ctx context.Context) error {
			<-ctx.Done()
			ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), shutdownTimeout)
			defer cancel()
			if s.http.Shutdown(ctx) != nil {
				_ = s.http.Close() // those that take longer are cut off
			}
			return nil
		})
}

// healthHandler answers /healthz and /readyz, and nothing else: anybody may reach it.
func healthHandler(duties []duty) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		var errs []error
		for _, d := range duties {
			errs = append(errs, d.Ready())
		}
		if err := errors.Join(errs...); err != nil {
			answer(w, http.StatusServiceUnavailable, err.Error())
			return
		}
		answer(w, http.StatusOK, "ok")
	})
	return mux
}

func answer(w http.ResponseWriter, code int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(code)
	_, _ = io.WriteString(w, text+"\n") // who asked is gone
}

func metricsHandler(registry *prometheus.Registry) http.Handler {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", promhttp.HandlerFor(registry, promhttp.HandlerOpts{Registry: registry}))
	return mux
}
