package dockerconfig

import (
	"fmt"
	"net"
	"net/url"
	"path"
	"regexp"
	"strings"
)

// Docker Hub's two hosts: image references are normalised to the first, docker login writes the second
// ("https://index.docker.io/v1/").
const (
	hub      = "docker.io"
	hubIndex = "index.docker.io"
)

// Normalize returns what a kubelet makes of a docker config key, host[:port][/path], by the rules of
// pkg/credentialprovider/keyring.go (Add): a lower-case http:// or https:// goes, and so do user information, query
// and fragment; a path that begins with /v1/ or /v2/ loses that; a path that is only "/" goes. Nothing else changes:
// upper case, default ports, other trailing slashes, "/v1" without a slash after it, and docker.io beside
// index.docker.io stay as they are.
//
// The error is ErrRegistry, and names the key without its user information: a kubelet ignores a key that is no URL,
// and one without a host, or whose own normal form is no URL, can match no image. A result may hold what a mangled
// key holds; it is not for printing.
func Normalize(key string) (string, error) {
	full := key
	if !strings.HasPrefix(key, "http://") && !strings.HasPrefix(key, "https://") {
		full = "https://" + key
	}
	parsed, err := url.Parse(full)
	if err != nil || parsed.Host == "" {
		return "", fmt.Errorf("%w: %q", ErrRegistry, printable(key)) // err quotes the key
	}
	repository := parsed.Path
	if strings.HasPrefix(repository, "/v1/") || strings.HasPrefix(repository, "/v2/") {
		repository = repository[len("/v1"):]
	}
	if repository == "/" {
		repository = ""
	}
	normal := parsed.Host + repository
	if _, err := parseNormal(normal); err != nil {
		return "", fmt.Errorf("%w: %q", ErrRegistry, printable(key))
	}
	return normal, nil
}

// Match returns the credentials that a kubelet tries for an image of a pod spec, in its order, if this config is the
// only one it has; none, if it pulls anonymously. It tries them one after the other, and never anonymously after
// them; an entry with tokens alone it tries as an anonymous pull.
//
// The rules are the kubelet's (pkg/credentialprovider/keyring.go, Lookup). A key matches if its host has as many
// labels as the image's and each matches as a glob (path.Match), the ports are equal as written, and its path is a
// plain prefix of the image's: "ghcr.io/a" matches ghcr.io/abc. Case counts. Order: normalised keys backwards. If
// nothing matches and the image is on Docker Hub, the key index.docker.io serves; so it does, in a kubelet, for hosts
// without a dot and a port (localhost/app).
//
// The error is ErrImage.
func (c Config) Match(image string) ([]Entry, error) {
	repository, err := Repository(image)
	if err != nil {
		return nil, err
	}
	var found, index []Entry
	target, targetErr := parseNormal(repository)
	for _, e := range c.entries {
		normal := e.normal.Reveal()
		if targetErr == nil && matches(normal, target) {
			found = append(found, e)
		}
		if normal == hubIndex {
			index = append(index, e)
		}
	}
	host, _, _ := strings.Cut(repository, "/")
	if len(found) == 0 && (host == hub || !strings.ContainsAny(host, ".:")) {
		return index, nil
	}
	return found, nil
}

// Serves reports whether Match finds credentials for an image; of what is no image it does not.
func (c Config) Serves(image string) bool {
	found, err := c.Match(image)
	return err == nil && len(found) > 0
}

// matches reports whether a normalised key matches a repository.
func matches(normal string, target *url.URL) bool {
	key, err := parseNormal(normal)
	if err != nil || !strings.HasPrefix(target.Path, key.Path) {
		return false
	}
	keyLabels, keyPort := splitHost(key.Host)
	labels, port := splitHost(target.Host)
	if keyPort != port || len(keyLabels) != len(labels) {
		return false
	}
	for i, glob := range keyLabels {
		if ok, err := path.Match(glob, labels[i]); err != nil || !ok {
			return false
		}
	}
	return true
}

// parseNormal reads host[:port][/path]. A kubelet parses its keys a second time like this, and so decodes "%" twice.
func parseNormal(normal string) (*url.URL, error) { return url.Parse("https://" + normal) }

func splitHost(host string) (labels []string, port string) {
	name, port, err := net.SplitHostPort(host)
	if err != nil {
		name, port = host, ""
	}
	return strings.Split(name, "."), port
}

// The grammar of image references as distribution/reference 0.6 defines it, which kubelets use.
var (
	imagePattern = func() *regexp.Regexp {
		const (
			label     = `[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?`
			domain    = `(?:` + label + `(?:\.` + label + `)*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?`
			component = `[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*`
			name      = `(?:(?:` + domain + `)/)?(` + component + `(?:/` + component + `)*)`
			tag       = `(?::\w[\w.-]{0,127})?`
			digest    = `(?:@(?:sha256:[a-f0-9]{64}|sha384:[a-f0-9]{96}|sha512:[a-f0-9]{128}))?`
		)
		return regexp.MustCompile(`^(` + name + `)` + tag + digest + `$`)
	}()
	imageIDPattern = regexp.MustCompile(`^[a-f0-9]{64}$`)
)

// Repository returns the repository of an image reference as a kubelet normalises it before it looks for credentials
// (and as it asks credential providers for it): without tag and digest, with Docker Hub's defaults: "nginx:1" is
// "docker.io/library/nginx". Bare image IDs and everything that is no reference are ErrImage.
func Repository(image string) (string, error) {
	const maxPath = 255
	match := imagePattern.FindStringSubmatch(qualify(image))
	if match == nil || len(match[2]) > maxPath || imageIDPattern.MatchString(image) {
		return "", fmt.Errorf("%w: %q", ErrImage, bounded(image))
	}
	return match[1], nil
}

// qualify puts the defaults of Docker Hub in front. The first component is a host if there is a slash after it and it
// cannot be a Hub user: it has a dot, a port or an upper-case letter, or is localhost.
func qualify(image string) string {
	first, rest, slash := strings.Cut(image, "/")
	isHost := slash && (strings.ContainsAny(first, ".:") || first == "localhost" || strings.ToLower(first) != first)
	switch {
	case !isHost:
		first, rest = hub, image
	case first == hubIndex:
		first = hub
	}
	if first == hub && !strings.Contains(rest, "/") {
		rest = "library/" + rest
	}
	return first + "/" + rest
}
