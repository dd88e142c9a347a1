package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/sys/unix"

	"github.com/imps-node/imps/pkg/api/v1alpha1"
	"github.com/imps-node/imps/pkg/ecr"
	"github.com/imps-node/imps/pkg/sync/cluster"
)

// ecrSources is pkg/ecr as the cluster duty wants it.
type ecrSources struct{}

func (ecrSources) Secret(data map[string][]byte) ([]cluster.Registry, error) {
	registry, grant, err := ecr.ParseSecret(data)
	if err != nil {
		return nil, err
	}
	return []cluster.Registry{{Host: registry.Host, Grant: grant}}, nil
}

func (ecrSources) Spec(spec v1alpha1.ECRSource) ([]cluster.Registry, error) {
	registries, grants, err := ecr.ParseRegistries(spec.Registries, spec.RoleARN, spec.ExternalID)
	if err != nil {
		return nil, err
	}
	parsed := make([]cluster.Registry, len(registries))
	for i := range registries {
		parsed[i] = cluster.Registry{Host: registries[i].Host, Grant: grants[i]}
	}
	return parsed, nil
}

// ecrTokens are pkg/ecr's, as the cluster duty wants them. Their task runs as long as the duties.
type ecrTokens struct{ tokens *ecr.Tokens }

// newTokens returns the tokens of a process, with their metrics. What has changed is told with changed.
func newTokens(changed func(id string), registry prometheus.Registerer, log *slog.Logger) (*ecrTokens, error) {
	hostname, err := os.Hostname()
	if err != nil {
		return nil, fmt.Errorf("name of this machine, for AWS: %w", err)
	}
	tokens := ecr.New(ecr.Config{
		Minter: ecr.NewAWS(ecr.AWSOptions{SessionName: sessionName(hostname)}),
		Clock:  machineClock{}, Log: log, Changed: changed,
	})
	if err := registry.Register(tokens); err != nil {
		return nil, fmt.Errorf("metrics: %w", err)
	}
	return &ecrTokens{tokens}, nil
}

func (t *ecrTokens) Run(ctx context.Context) error {
	t.tokens.Run(ctx)
	return nil
}

// Ready: whoever needs a token waits for it, not the others.
func (*ecrTokens) Ready() error { return nil }

func (t *ecrTokens) Use(user string, wanted []cluster.Wanted) {
	wants := make([]ecr.Wanted, len(wanted))
	for i, w := range wanted {
		wants[i] = ecr.Wanted{Grant: w.Grant.(ecr.Grant), Known: ecr.Token(w.Known)}
	}
	t.tokens.Use(user, wants...)
}

func (t *ecrTokens) Now() time.Time { return t.tokens.Now() }

func (t *ecrTokens) Status(grant cluster.Grant) cluster.TokenStatus {
	s := t.tokens.Status(grant.(ecr.Grant))
	return cluster.TokenStatus{Token: cluster.Token(s.Token), Err: classified(s.Err), Pending: s.Pending}
}

// classified returns an error of pkg/ecr as one of the cluster duty's, where it has one for it.
func classified(err error) error {
	switch {
	case errors.Is(err, ecr.ErrIdentityChanged):
		return tokenError{err, cluster.ErrIdentityChanged}
	case errors.Is(err, ecr.ErrNoCredentials):
		return tokenError{err, cluster.ErrNoCredentials}
	default:
		return err
	}
}

// tokenError has the words of one error, and the class of another.
type tokenError struct {
	error
	class error
}

func (e tokenError) Unwrap() error { return e.class }

// machineClock is the clock of this machine.
type machineClock struct{}

func (machineClock) Now() time.Time { return time.Now() }

func (machineClock) Boot() time.Duration {
	var at unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &at); err != nil {
		return time.Since(started) // it goes on but while the machine is suspended
	}
	return time.Duration(at.Nano())
}

var started = time.Now()

// sessionName is the name under which roles are assumed on a machine, or in a Pod, of this name; CloudTrail shows it. AWS
// allows letters, digits and _+=,.@-, and 64 of them.
func sessionName(hostname string) string {
	name := "imps-" + hostname
	if len(name) > 64 {
		name = name[:64]
	}
	return name
}
