package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"runtime"
	"time"

	"github.com/imps-node/imps/pkg/nodecache"
)

// version is set by the linker.
var version = "dev"

const (
	apiVersion   = "credentialprovider.kubelet.k8s.io/v1"
	kindRequest  = "CredentialProviderRequest"
	kindResponse = "CredentialProviderResponse"

	// maxRequestBytes bounds what is read: a request has an image, a token of some kilobytes, and annotations.
	maxRequestBytes = 1 << 20

	// margin is how long a credential must still be good: the pull may have to wait for others.
	margin = time.Minute
	// cacheLongest is how long the kubelet keeps an answer: it learns from no refusal, so that what was revoked or rotated is
	// served that long. cacheWithheld is how long it keeps one from which something was left out that expires.
	cacheLongest, cacheWithheld = 5 * time.Minute, time.Second

	// patience is how long a namespace is waited for that the agent has not dealt with yet, since a pull that fails backs off for
	// ten seconds. After a pause there is another look.
	patience                    = 500 * time.Millisecond
	pauseShortest, pauseLongest = time.Millisecond, 16 * time.Millisecond
)

// Scopes that a provider entry of the kubelet's configuration may have: one whose requests come with tokens, and one whose
// requests come without.
const scopeNode, scopeNamespace = "Node", "Namespace"

// request is what the kubelet asks (k8s.io/kubelet/pkg/apis/credentialprovider/v1). Fields that newer ones add are no matter.
type request struct {
	APIVersion          string `json:"apiVersion"`
	Kind                string `json:"kind"`
	Image               string `json:"image"`
	ServiceAccountToken string `json:"serviceAccountToken"`
}

// response is what it gets. Kubelets decode it strictly.
type response struct {
	APIVersion    string          `json:"apiVersion"`
	Kind          string          `json:"kind"`
	CacheKeyType  string          `json:"cacheKeyType"`
	CacheDuration string          `json:"cacheDuration"`
	Auth          map[string]auth `json:"auth"`
}

type auth struct {
	Username string `json:"username"`
	Password string `json:"password"`
}

// options are the flags.
type options struct {
	cacheDir string
	audience string
	scope    string
	version  bool
	patience time.Duration
}

// run answers one request, and returns the exit code. Whatever goes to stderr is in the kubelet's log, so that these are fixed
// sentences.
func run(args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	o, err := parse(args, stderr)
	if errors.Is(err, flag.ErrHelp) {
		return 0
	}
	if err == nil {
		if o.version {
			_, err = fmt.Fprintf(stdout, "imps-credprovider %s, %s, %s/%s\n", version, runtime.Version(), runtime.GOOS, runtime.GOARCH)
		} else {
			err = o.answer(stdin, stdout, stderr)
		}
	}
	if err != nil {
		_, _ = fmt.Fprintf(stderr, "imps-credprovider: %v\n", err)
		return 1
	}
	return 0
}

func parse(args []string, stderr io.Writer) (options, error) {
	o := options{patience: patience}
	flags := flag.NewFlagSet("imps-credprovider", flag.ContinueOnError)
	flags.SetOutput(io.Discard) // errors quote arguments
	flags.StringVar(&o.cacheDir, "cache-dir", nodecache.DefaultDir, "`folder` of the node cache")
	flags.StringVar(&o.audience, "token-audience", "imps", "`audience` that the tokens of ServiceAccounts are for")
	flags.StringVar(&o.scope, "scope", scopeNode, "`scope` of the entry in the kubelet's configuration: "+scopeNode+", or "+scopeNamespace+
		" for one with tokenAttributes, which is not answered without a token")
	flags.BoolVar(&o.version, "version", false, "print the version")
	flags.Usage = func() {}
	err := flags.Parse(args)
	switch {
	case errors.Is(err, flag.ErrHelp):
		_, _ = io.WriteString(stderr, "imps-credprovider is started by the kubelet, with a request on its standard input:\n")
		flags.SetOutput(stderr)
		flags.PrintDefaults()
		return o, err
	case err != nil || flags.NArg() > 0:
		return o, errors.New("a flag is not known, or wrong; see --help")
	case o.cacheDir == "" || o.audience == "":
		return o, errors.New("--cache-dir and --token-audience must not be empty")
	case o.scope != scopeNode && o.scope != scopeNamespace:
		return o, errors.New("--scope must be " + scopeNode + " or " + scopeNamespace)
	}
	return o, nil
}

// answer reads a request, and writes the answer: an error is about the request, and what is not known is an empty answer.
func (o options) answer(stdin io.Reader, stdout, stderr io.Writer) error {
	raw, err := io.ReadAll(io.LimitReader(stdin, maxRequestBytes+1))
	switch {
	case err != nil:
		return errors.New("the request cannot be read")
	case len(raw) > maxRequestBytes:
		return errors.New("the request is too large")
	}
	var r request
	if json.Unmarshal(raw, &r) != nil {
		return errors.New("the request is no JSON of the kind that it should be")
	}
	if r.Kind != kindRequest || r.APIVersion != apiVersion {
		return errors.New("the request is not of kind " + kindRequest + " in " + apiVersion)
	}
	if r.Image == "" {
		return errors.New("the request names no image")
	}
	found, doubt := o.lookup(r, time.Now())
	if doubt != "" {
		// For people: kubelets keep it for errors, and this is none, as other sources of credentials are to be tried.
		_, _ = fmt.Fprintf(stderr, "imps-credprovider: no credentials: %s\n", doubt)
	}
	answer, err := json.Marshal(found)
	if err != nil {
		return errors.New("the answer cannot be encoded")
	}
	if _, err := stdout.Write(answer); err != nil {
		return errors.New("the answer cannot be written")
	}
	return nil
}

// lookup finds the answer. Whatever is in doubt is none, and what that is is said: the kubelet then goes on without.
func (o options) lookup(r request, now time.Time) (answer response, doubt string) {
	// Not kept by the kubelet, which would keep an empty answer for as long as its configuration says without this.
	none := response{APIVersion: apiVersion, Kind: kindResponse, CacheKeyType: "Image", CacheDuration: "0s", Auth: map[string]auth{}}
	scope := nodecache.Node
	switch {
	case r.ServiceAccountToken != "":
		// Never of the node, or of another namespace.
		namespace, ok := namespaceOf(r.ServiceAccountToken, o.audience, now)
		if !ok {
			return none, "the token is not one of a ServiceAccount for the audience, or has expired"
		}
		scope = nodecache.InNamespace(namespace)
	case o.scope != scopeNode:
		return none, "the request has no token"
	}
	reader := nodecache.NewReader(o.cacheDir)
	found, err := reader.Lookup(scope, r.Image, margin)
	if errors.Is(err, nodecache.ErrUnknown) && scope != nodecache.Node && o.await(reader, scope) {
		found, err = reader.Lookup(scope, r.Image, margin)
	}
	switch {
	case errors.Is(err, nodecache.ErrUnknown):
		return none, "the node cache has nothing about the namespace, or the node"
	case errors.Is(err, nodecache.ErrQuestion):
		return none, "the image names no registry, or the token no namespace"
	case err != nil:
		return none, "the node cache cannot be read: its folder and files must be root's alone, and as the agent has written them"
	case !found.Matches:
		// What does not serve this image must not be kept for it.
		return none, ""
	}
	lasts := cacheLongest
	answer = response{APIVersion: apiVersion, Kind: kindResponse, CacheKeyType: "Registry", Auth: map[string]auth{}}
	if found.Withheld {
		// What expires will have been replaced in a moment, and may serve other images of the registry better.
		lasts, answer.CacheKeyType = cacheWithheld, "Image"
	}
	for _, c := range found.Credentials {
		if left, expires := c.Left(); expires {
			lasts = min(lasts, left-margin)
		}
		username, password := c.Reveal()
		answer.Auth[c.Key()] = auth{username, password}
	}
	answer.CacheDuration = lasts.String()
	return answer, ""
}

// await waits for what the agent is to say about a scope, as long as there is an agent, and reports whether it came.
func (o options) await(reader *nodecache.Reader, scope nodecache.Scope) bool {
	deadline := time.Now().Add(o.patience)
	for pause, look := pauseShortest, 0; time.Now().Before(deadline); pause, look = min(2*pause, pauseLongest), look+1 {
		if look%8 == 0 && !nodecache.Alive(o.cacheDir) {
			return false
		}
		<-time.After(pause)
		if reader.Known(scope) {
			return true
		}
	}
	return false
}
