// Package registry runs private image registries for tests and the demo: CNCF Distribution, behind a guard that lets in
// whoever has a good token of an AWS of test/fakeaws, or, for nodes that pull themselves, behind one for each of several
// hosts.
package registry

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"
	corev1 "k8s.io/api/core/v1"

	"github.com/imps-node/imps/pkg/dockerconfig"
	"github.com/imps-node/imps/test/cluster/cluster"
	"github.com/imps-node/imps/test/fakeaws"
)

// Build builds the registry into a folder and returns the binary's path. root is the folder of the repository.
func Build(ctx context.Context, root, dir string) (string, error) {
	path, err := filepath.Abs(filepath.Join(dir, "registry"))
	if err != nil {
		return "", err
	}
	out, err := exec.CommandContext(ctx, "go", "build", "-C", filepath.Join(root, "test/registry/distribution"), "-buildvcs=false", "-o", path, ".").CombinedOutput() //nolint:gosec // of the repository
	if err != nil {
		return "", fmt.Errorf("build the registry: %w: %s", err, out)
	}
	return path, nil
}

// Registry is one that runs, with one image in it.
type Registry struct {
	// Image is what a Pod would name.
	Image string

	guard        *httptest.Server
	distribution *distribution
}

// Start starts a registry that answers to the host of ECR in a region. It ends with Stop, and with the control plane at
// the latest. dir holds its configuration.
func Start(ctx context.Context, control *cluster.Cluster, binary, dir string, aws *fakeaws.Server, host, region string) (*Registry, error) {
	image, err := random.Image(1024, 2)
	if err != nil {
		return nil, err
	}
	d, err := serve(ctx, control, binary, dir, image)
	if err != nil {
		return nil, err
	}
	guard := httptest.NewServer(aws.Guard(region, httputil.NewSingleHostReverseProxy(d.url)))
	return &Registry{Image: host + "/" + pushed, guard: guard, distribution: d}, nil
}

// pushed is the name of the image that is in a registry.
const pushed = "app:v1"

// distribution is CNCF Distribution, without a guard.
type distribution struct {
	url     *url.URL
	process *exec.Cmd
	ended   chan struct{}
}

// serve starts it with one image in it.
func serve(ctx context.Context, control *cluster.Cluster, binary, dir string, image v1.Image) (*distribution, error) {
	listener, err := (&net.ListenConfig{}).Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	address := listener.Addr().String()
	if err := listener.Close(); err != nil {
		return nil, err
	}
	config := filepath.Join(dir, "registry.yaml")
	content := `{version: 0.1, log: {level: error, accesslog: {disabled: true}}, storage: {inmemory: {}}, http: {addr: "` + address + `", secret: x}}`
	if err := os.WriteFile(config, []byte(content), 0o600); err != nil {
		return nil, err
	}
	d := &distribution{url: &url.URL{Scheme: "http", Host: address}, ended: make(chan struct{})}
	d.process = exec.CommandContext(context.WithoutCancel(ctx), binary, "serve", config) //nolint:gosec // what was just built
	d.process.Env = []string{"OTEL_TRACES_EXPORTER=none"}
	if err := control.Start(d.process); err != nil {
		return nil, fmt.Errorf("start the registry: %w", err)
	}
	go func() {
		defer close(d.ended)
		_ = d.process.Wait()
	}()
	if err := push(ctx, address, image); err != nil {
		d.stop()
		return nil, fmt.Errorf("push an image: %w", err)
	}
	return d, nil
}

// push puts an image into the registry, past the guard, once it is there.
func push(ctx context.Context, address string, image v1.Image) error {
	reference, err := name.ParseReference(address + "/" + pushed)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := remote.Write(reference, image, remote.WithContext(ctx))
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

func (d *distribution) stop() {
	_ = d.process.Process.Kill() // it may have ended
	<-d.ended
}

// Stop ends it.
func (r *Registry) Stop() {
	r.guard.Close()
	r.distribution.stop()
}

// Pull pulls the image with what a pull Secret has for it, as a kubelet does: every byte of it.
func (r *Registry) Pull(ctx context.Context, secret *corev1.Secret) error {
	config, _, err := dockerconfig.Parse(string(secret.Type), secret.Data)
	if err != nil {
		return err
	}
	entries, err := config.Match(r.Image)
	if err != nil {
		return err
	}
	if len(entries) != 1 {
		return fmt.Errorf("there are %d credentials for %s", len(entries), r.Image)
	}
	reference, err := name.ParseReference(r.Image)
	if err != nil {
		return err
	}
	image, err := remote.Image(reference, remote.WithContext(ctx),
		remote.WithTransport(redirect{to: r.guard.Listener.Addr().String(), next: r.guard.Client().Transport}),
		remote.WithAuth(&authn.Basic{Username: entries[0].Username.Reveal(), Password: entries[0].Password.Reveal()}))
	if err != nil {
		return err
	}
	return validate.Image(image)
}

// redirect sends every request to one address.
type redirect struct {
	to   string
	next http.RoundTripper
}

func (r redirect) RoundTrip(request *http.Request) (*http.Response, error) {
	request = request.Clone(request.Context())
	request.URL.Scheme, request.URL.Host = "http", r.to
	return r.next.RoundTrip(request)
}
