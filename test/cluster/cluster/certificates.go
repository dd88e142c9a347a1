package cluster

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"strings"
	"time"
)

// certificateLifetime is longer than any cluster lives.
const certificateLifetime = 365 * 24 * time.Hour

// key is a private key and its PEM.
type key struct {
	private *ecdsa.PrivateKey
	pem     []byte
}

func newKey() (key, error) {
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return key{}, fmt.Errorf("make a key: %w", err)
	}
	der, err := x509.MarshalECPrivateKey(private)
	if err != nil {
		return key{}, fmt.Errorf("encode a key: %w", err)
	}
	return key{private: private, pem: pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})}, nil
}

// authority signs the API server's certificate and those of the users that
// come with one.
type authority struct {
	key  key
	cert *x509.Certificate
	pem  []byte
}

func newAuthority() (*authority, error) {
	k, err := newKey()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		Subject:               pkix.Name{CommonName: "imps test cluster"},
		KeyUsage:              x509.KeyUsageCertSign,
		IsCA:                  true,
		BasicConstraintsValid: true,
	}
	der, err := sign(template, template, k, k)
	if err != nil {
		return nil, fmt.Errorf("make the authority: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("read back the authority: %w", err)
	}
	return &authority{key: k, cert: cert, pem: certPEM(der)}, nil
}

// pair is a certificate and its key, both as PEM.
type pair struct {
	cert, key []byte
}

// serving returns the certificate of a server on loopback.
func (a *authority) serving(name string) (pair, error) {
	return a.issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: name},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		DNSNames:    []string{"localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	})
}

// user returns a certificate that the API server takes for the user.
func (a *authority) user(name string, groups []string) (pair, error) {
	return a.issue(&x509.Certificate{
		Subject:     pkix.Name{CommonName: name, Organization: groups},
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth},
	})
}

func (a *authority) issue(template *x509.Certificate) (pair, error) {
	k, err := newKey()
	if err != nil {
		return pair{}, err
	}
	der, err := sign(template, a.cert, k, a.key)
	if err != nil {
		return pair{}, fmt.Errorf("sign the certificate of %q: %w", template.Subject.CommonName, err)
	}
	return pair{cert: certPEM(der), key: k.pem}, nil
}

// clientTLS trusts this authority and no other.
func (a *authority) clientTLS() *tls.Config {
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	return &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
}

func sign(template, parent *x509.Certificate, subject, signer key) ([]byte, error) {
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	template.SerialNumber = serial
	// An hour back, for clients whose clock is behind.
	template.NotBefore = time.Now().Add(-time.Hour)
	template.NotAfter = time.Now().Add(certificateLifetime)
	return x509.CreateCertificate(rand.Reader, template, parent, &subject.private.PublicKey, signer.private)
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

// randomToken returns a bearer token that cannot be guessed.
func randomToken() string {
	return strings.ToLower(rand.Text())
}
